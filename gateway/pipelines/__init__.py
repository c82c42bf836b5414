"""The gateway's side of a pipeline: which replicas there are, how they are chained, claimed, wired and watched."""

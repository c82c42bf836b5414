"""How many pipelines the demand asks for. Pure and light: Serve's controller imports the policy."""

"""OpenTelemetry traces of calls. `work` is pure; `spans` is the only module that imports opentelemetry, and is imported only
where traces are on."""

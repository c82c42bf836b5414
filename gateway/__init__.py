"""What faces the client: tokenizer, sampling, scheduler, pipelines, doors, command line. No torch here."""

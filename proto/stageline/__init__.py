"""What a client of Stageline imports: generated stubs and typed errors."""

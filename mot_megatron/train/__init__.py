"""Training: the session, its step, pipeline and saved state; loading and upcycling models."""

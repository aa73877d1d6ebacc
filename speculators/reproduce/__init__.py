"""Makes a run again from its lock and verifies it stage by stage."""

"""Export to servers' layouts, and import of published checkpoints."""

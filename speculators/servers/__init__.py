"""Everything that speaks to an inference engine over HTTP: states, answers, acceptance, load."""

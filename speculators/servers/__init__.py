"""Everything that talks to an inference engine over HTTP: hidden states, answers, acceptance, load."""

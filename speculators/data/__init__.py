"""Conversations, chat template and loss mask, the hidden-state store, packed rows."""

"""The GPT model, defined once as a list of named layers."""

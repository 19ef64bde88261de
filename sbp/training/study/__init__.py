"""The study: what the talk claims, what is trained to check it, and the rule that decides."""

"""The paper's claims, the rule that decides them, and the text of RESULTS.md."""

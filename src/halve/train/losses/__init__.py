"""How far is a student from its teacher? Pure functions of logits and states."""

"""How the built-in model was made, and how it is judged. Run from the checkout."""

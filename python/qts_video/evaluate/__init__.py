"""How well a model answers questions about videos, with and without selection: what ``qts eval`` runs."""

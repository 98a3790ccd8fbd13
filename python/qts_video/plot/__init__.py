"""Pictures of relevance and of selections: what ``qts plot`` draws. Drawing is apart from measuring: every ``draw_*``
takes numbers."""

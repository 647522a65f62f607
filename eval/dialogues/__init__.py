"""Dialogues with live tools: played, journaled, counted."""

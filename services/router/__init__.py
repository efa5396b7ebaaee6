"""The edge: text outside, tokens inside. Read session.py first."""

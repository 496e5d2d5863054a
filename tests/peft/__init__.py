"""PEFT as a peer: its files, its configurations, and `surgery.peft` in its place."""

"""Benchmarks of cotune beside what its users would otherwise run; README.md in this folder says what each one asks."""

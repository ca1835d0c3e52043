"""The fault suite: real runs, really killed, starved and fed with nonsense. `make faults` runs all of it."""

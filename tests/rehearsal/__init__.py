"""Rehearsals of steps on a GPU that is not there: what they launch, and what would wait for the device."""

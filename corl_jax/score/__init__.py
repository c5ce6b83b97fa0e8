"""The command that scores the cases of a file with a reward."""

"""Reads data sets in VLMEvalKit's TSV format, asks as Janus is asked there, and rates answers."""

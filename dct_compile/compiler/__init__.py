"""Compiles Dynamo graphs: options, state inputs, the passes, and what happens at the first use of a compiled graph."""

"""Passes over FX graphs: find the collectives, decide about each, rewrite those that pay.

Analysis changes nothing; rewriting only executes decisions.
"""

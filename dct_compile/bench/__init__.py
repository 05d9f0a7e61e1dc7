"""What ``dct bench`` measures with: cases, timing, results."""

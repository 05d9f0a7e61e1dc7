"""Where the examples are, and the options by which they send everything as it is."""

from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
DENSE = {
    "dp_density": 1.0,
    "activation_codec": "dense",
    "embedding_codec": "dense",
    "parameter_codec": "dense",
    "sharded_gradients": "dense",
}

"""Entry point of the command ``dct``."""

from dct_compile.cli.lazy import LazyGroup

main = LazyGroup(
    "dct",
    {
        "advise": (
            "dct_compile.cli.advise",
            "Predict the step time of a model dense, with torch's fp16 hook and with DCT, and say which options to set.",
        ),
        "inspect": ("dct_compile.cli.inspect", "Show every collective of a model, forward and backward, and what would become of it."),
        "link": (
            "dct_compile.cli.link",
            "Measure the link between the ranks that this command is started on, and print the option that says it.",
        ),
        "train": (
            "dct_compile.cli.train",
            "Train a model dense and with DCT, on a mesh of data-parallel x model-parallel processes of this machine (gloo), and compare.",
        ),
    },
    help="Dynamic Communication Thresholding for torch.compile.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
bench = LazyGroup(
    "bench",
    {
        "accuracy": ("dct_compile.cli.accuracy", "Train models whose activations are compressed where parallelisms would send them."),
        "kernels": (
            "dct_compile.cli.bench",
            "Time every op of torch.ops.dct beside a copy, torch.add and the same work in ordinary PyTorch ops.",
        ),
    },
    help="Measure what compression costs on this machine.",
)
main.add_command(bench)

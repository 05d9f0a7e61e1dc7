"""Every reason that a site can have in the report, and every note: one table, explained entry by entry in docs/troubleshooting.md."""

from collections.abc import Sequence
from enum import StrEnum, unique

_NAMED = 8
"""Parameters that a note names."""
ENCODES_ITSELF = "it encodes its exchanges itself, as dct_compile's report says"
"""Why Dynamo is not to trace a function of this project. Such a graph break needs no note."""


@unique
class Reason(StrEnum):
    """Why a site was left dense, or how it travels. Templates for ``str.format``; a name in braces is filled in by the plan."""

    ONE_RANK = "a group of one rank sends nothing"
    SUBGRAPH = "it stands in a subgraph of {operator}, which is left as it is"
    COLLECTIVE = "{collective} is not compressed"
    NOT_WAITED = "its result is used before it was waited for"
    NEVER_WAITED = "nothing waits for its result"
    UNKNOWN_SHAPE = "the shape of the input is unknown"
    DTYPE = "dtype {dtype} is not compressed (float32, bfloat16 and float16 are)"
    REDUCE_OP = "reduce operation {op!r} is not compressed (sum and avg are)"

    SPARSE = "a sparse gradient is left to torch, which sends the rows that a step used; the bytes here are those of a dense one"

    NO_SCHEME = "the options name no scheme that carries this"

    GRADIENT_COLLECTIVE = "{collective} of a gradient is not compressed"
    WHOSE_GRADIENT = "compiled autograd's graph does not say whose gradient this is; use DDP's default reducer"
    DP_DENSITY_ONE = "dp_density=1 keeps everything"
    OWN_DENSITY_ONE = "parameter_densities keeps everything of it"
    MIN_NUMEL = "fewer than min_numel={min_numel} elements"
    EXEMPT = "exempt by pattern {pattern!r}"
    ONE_MACHINE = "all ranks are on one machine, where dense is as fast as memory; link='1Gbit/s' assumes a slower link, link=None none"
    FAST_COPY = "devices of one process are taken for linked as fast as memory; link='16Gbit/s' assumes a slower link, link=None none"
    FAST_LINK = "{scheme} would take {seconds}, dense takes {dense} on a link of {link}; at least a fifth must be saved"
    GRADIENT_TOO_LARGE = "{scheme} with {ranks} ranks would send {wire} bytes, dense sends {dense}"
    NO_HOSTS = "two_level is for DDP on several hosts with several ranks each, which the option ranks_per_host tells"
    MAY_BE_UNUSED = "{scheme} cannot leave out a parameter for one step, as find_unused_parameters asks"
    NO_MATRIX = "a vector has no low-rank factors"
    HIGH_RANK = "factors of rank {rank} are at least half of a {rows} x {columns} matrix"
    OWN_HOOK = "DDP has a communication hook of its own"
    PYTHON_REDUCER = "DDP's python reducer issues its collectives itself"
    DELAYED = "DDP reduces these parameters itself, as delay_all_reduce_named_params asks"
    USED_PARAMETERS = "DDP compares the parameters that the ranks used, as find_unused_parameters asks"
    BUFFERS = "DDP copies rank 0's buffers each step; mean over the ranks"

    PIPELINE_STARTS = "dense until a training step has run in every stage of the pipeline"
    PIPELINE_LACKS = "no graph of backend 'dct' has run, and been given a gradient, in these stages of the pipeline: {stages}"

    NO_FORWARD = "no forward collective has this one as its backward, so there is no mask to reuse"
    PARAMETERS = "carries parameters, not activations"
    FOREIGN = "its input was computed outside of this graph, so an embedding exchange cannot be told from an activation"
    RETURNED = "the graph returns its result, to the caller or, after a graph break, to the next graph"
    STORED = "its result is written to a buffer or another input, which keeps exact values"
    FILLED = "a mask has put large or infinite numbers into its rows, beside which codecs lose all others"
    COUNTED = "counts, masks and single numbers of rows, such as sums and maxima, stay exact"
    EVALUATION = "mp_eval=False leaves evaluation dense"
    NO_ROWS = "a tensor of fewer than two dimensions has no rows"
    DYNAMIC_SIZE = "a size between the first and the last is dynamic"
    DYNAMIC_WIDTH = "the width of a row is dynamic"
    NARROW_ROW = "rows of {width} elements are few numbers each, such as statistics, and stay exact"
    WIDE_ROW = "rows of {width} elements are wider than {limit}"
    BACKWARD_COLLECTIVE = "its backward is {actual}, expected {expected}"
    BACKWARD_SHAPE = "its backward carries rows of another shape"
    BACKWARD_DTYPE = "its backward has dtype {dtype}"
    MESSAGE_CODEC = "activation_codec='threshold' does not encode messages between stages; 'int8' and 'int4' do"
    CODEC_DENSE = "{option}='dense'"
    PARAMETER_DENSE = "parameter_codec='dense'"
    SHARDED_DENSE = "sharded_gradients='dense'"
    ALREADY_SMALL = "parameters of dtype {dtype} are not smaller as {codec}"
    SHORT_SHARD = "{codec} blocks would not be smaller than its values"
    UNEVEN = "its graph gathers shards of unequal lengths: ranks whose graphs differ would send in another order"
    OWN_COMM = "FSDP has a custom {collective} of yours here"
    OWN_HOOK_OF_FSDP = "FSDP has an all_reduce hook of yours here"
    RESHARDED = "parameters that were resharded to fewer ranks after the forward (reshard_after_forward) are gathered as they are"
    EXTENSION = "a parameter with an fsdp_pre_all_gather of its own is encoded already"
    NO_LOCAL_GRADIENT = "the gradient of its input could not be found, so it could not be masked"
    QUANTIZED_TOO_LARGE = "int{bits} rows of {width} elements are not smaller than dense ones"
    MP_DENSITY_ONE = "mp_density=1 keeps everything"
    SHORT_ROW = "rows of {width} elements are too short for mp_density={density:g}"
    ROW_TOO_LARGE = "a row would take {wire} bytes, {dense} when dense"
    DENSE_FORWARD = "its forward is dense: {reason}"

    GRADIENT = "{scheme}, density {density}"
    GRADIENT_BUT = "{scheme}, density {density}; dense: {names}"
    TWO_LEVEL = "{reason}; the {ranks} ranks of a host add up dense"
    LOW_RANK = "powersgd, rank {rank}"
    LOW_RANK_BUT = "powersgd, rank {rank}; dense: {names}"
    QUANTIZED = "int{bits} rows with stochastic rounding"
    QUANTIZED_SUM = "int{bits} rows with stochastic rounding, added up by owners of shares"
    CAST = "bfloat16 on the wire"
    CAST_TOO_LARGE = "{dtype} is not larger than bfloat16, or a sum of so many ranks would be"
    BLOCKS = "{codec} blocks of {block} with stochastic rounding"
    BLOCKS_BUT = "{codec} blocks of {block} with stochastic rounding; exact: {names}"
    ROUNDED = "rounded to bfloat16"
    ROUNDED_BUT = "rounded to bfloat16; exact: {names}"
    BLOCKS_TOO_LARGE = "{codec} would send {wire} bytes, dense sends {dense}"
    ROW_THRESHOLD = "row threshold, {capacity} of {width} kept"
    FOLLOWS_FORWARD = "the forward's mask, values only"

    LATE = "{reason}; arrives one step later"
    NOW_IN_GRAPH = "{reason}; arrives now: arrival='late' holds for gradients that DDP averages outside of graphs"
    NOW_UNUSED = "{reason}; arrives now: with find_unused_parameters, DDP would drop what arrives for a parameter that no rank uses"
    UNTIL = "{reason}; until exchange {number}"
    DENSE_UNTIL = "dense until exchange {number}, as start_iter or density_warmup asks"


@unique
class Note(StrEnum):
    """What no site can tell, because there is none. Templates like :class:`Reason`.

    All but ``BUCKETS``, ``IGNORED``, ``RUN_TIME_ROWS``, ``UNMATCHED`` and the last four are also logged as a warning, by the first rank
    that has it.
    """

    NO_PROCESS_GROUP = "torch.distributed is not initialised: graphs were compiled as by backend 'inductor'"
    UNTESTED_TORCH = "torch {version} is newer than {newest}, the newest version that this release of dct-compile was tested with"
    GRAPH_BREAK = "a graph ends early, at {line}: {cause}. Collectives that run there are not seen{more}"
    ASYNC_COLLECTIVE = (
        "a graph ends early, at {line}: Dynamo does not trace a collective with async_op=True, so it stays dense. Call it without async_op,"
        " or as torch.distributed._functional_collectives, which are asynchronous by themselves. In an autograd function of your own,"
        " dct_compile.all_to_all_single in its place sends int8 rows"
    )
    SHARDED = (
        "data_parallel leaves these parameters as they are, and does not average their gradients, because each rank holds another shard of"
        " them: {parameters}"
    )
    REDUCED_BY_DTENSOR = (
        "data_parallel does not average the gradients of these parameters, because DTensor sums them over the same ranks: {parameters}"
    )
    REDUCED_BY_FSDP = (
        "data_parallel does not average the gradients of these parameters, because FSDP reduces them over the same ranks: {parameters}"
    )
    IN_THE_GRAPH = (
        "data_parallel does not average the gradients that a graph computes itself, by torch.func or torch.autograd.grad, of {parameters}:"
        " it averages what backward() gives to parameters, called on what the compiled function returns"
    )
    NO_PARAMETERS = (
        "data_parallel does not average the gradients of these tensors, and does not make them equal on all ranks, because they are no"
        " torch.nn.Parameter: {parameters}"
    )
    NOT_COMPILED = (
        "parts of DDP's model run outside of compiled graphs: {parameters}. Their gradients are compressed all the same, their other"
        " collectives are not seen. torch skips its own modules, such as nn.Sequential and nn.Linear, when DDP calls them:"
        " make them part of a module class of your own"
    )
    BYPASSED = "{optimizer} steps {count} compressed parameters without their first moment, because what arrives has added up already"
    UNKNOWN_OPTIMIZER = (
        "the first moment of {optimizer} is not known, so it is kept. For gradients that arrive late it is better left out: see"
        " dct_compile.optim.register_first_moment, or set first_moment='keep' to keep it without this note"
    )
    NO_OPTIMIZER = (
        "gradients were computed anew, and no torch.optim.Optimizer has stepped in between: the last ones count as applied. If they were"
        " discarded, call dct_compile.discard_gradients(model) in place of zero_grad"
    )
    UNMEASURED = (
        "the link of process group {group} was not measured, because a rank did not come within {seconds:g} s: bytes decide. Set the option"
        " 'link' where ranks compile at different times"
    )
    OTHER_OPTIONS = "the gradients of {module} travel by the options of the first graph that ran inside of its {wrapper}: {differences}"
    BUCKETS = (
        "{module} sends {share:.0%} of its bytes when the backward has ended. DistributedDataParallel(..., bucket_cap_mb={mib}) would send"
        " more of them beside it, and save up to {saved} of a step"
    )
    IGNORED = "DDP was told to ignore {parameters}: it does not average their gradients, and they are not in this table"
    UNMATCHED = "patterns of {option} that match nothing on this rank so far: {patterns}"
    RUN_TIME_ROWS = "{count} exchanges have rows that are known at run time only (0 in this table, which counts no bytes for them)"
    UNSEEN = "not seen, not compressed and not counted: {what}"
    ENCODED = "{name} has encoded {count} tensors outside of graphs, {before} bytes as {after} bytes so far; they are not in this table"
    TORCHREC = (
        "torchrec exchanges the embeddings of {modules} dense: sharders=[dct_compile.torchrec_sharder(EmbeddingBagCollectionSharder())] in"
        " DistributedModelParallel, and in its planner, sends int8 rows"
    )
    TORCHREC_SUMS = (
        "torchrec adds up the pooled embeddings of {tables} by its own reduce_scatter, dense or by a codec that the sharder had for"
        " POOLED_EMBEDDINGS_REDUCE_SCATTER. Without one, dct_compile.torchrec_sharder sends int8 rows for them as well"
    )


@unique
class BreakAdvice(StrEnum):
    """Where a graph break matters more, or can be looked into: follows ``Note.GRAPH_BREAK``."""

    DATA_PARALLEL = ", and data_parallel does not average the gradients of parameters that are used there"
    FULLGRAPH = ". torch.compile(..., fullgraph=True) makes it an error with the details"


@unique
class Unseen(StrEnum):
    """Collectives outside of everything that the report counts, for ``Note.UNSEEN``."""

    FSDP = "what FullyShardedDataParallel gathers and reduces; fully_shard is compressed"
    DTENSOR = "collectives on DTensor parameters outside of the model, as in gradient clipping and some optimizers"
    BUFFER_HOOK = "the buffers of DDP, which a communication hook of your own exchanges"


def abbreviated(names: Sequence[str]) -> str:
    """Returns the first names, and the number of the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

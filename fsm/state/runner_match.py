"""The one predicate that tells which runner serves which request."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from fsm.domain.devices import Placement
from fsm.domain.options import AUTOMATIC, Options
from fsm.machine.runner import Runner


@dataclass(frozen=True, slots=True)
class LoadedAs:
    """What a runner was loaded with, as far as requests are matched with it: a value that other machines can be told.

    The fields are those of `Runner`.
    """

    effective_options: Options = AUTOMATIC
    launch_options: Options = AUTOMATIC
    chosen_options: Options = AUTOMATIC
    usual_options: Options = AUTOMATIC
    equivalent_requests: tuple[Options, ...] = ()
    placement: Placement = field(default=Placement(()))
    fully_offloaded: bool = False


def loaded_as(runner: Runner) -> LoadedAs:
    """Return what a runner was loaded with; the bytes of its placement are left out, since no request names them."""
    return LoadedAs(
        runner.effective_options, runner.launch_options, runner.chosen_options, runner.usual_options,
        tuple(runner.equivalent_requests), Placement((), runner.placement.gpu_layers), runner.fully_offloaded,
    )  # fmt: skip


def match(runner: Runner | LoadedAs, asked: Options, explicit: Options | None = None) -> bool:
    """Tell whether a runner serves a request that names the options `asked`.

    An option that a request leaves open matches any value, so an automatic value is never a reason for a reload; but
    where neither context nor slots are named, a runner with less than usual does not serve, unless it was loaded for a
    request that named none either. `explicit` is `asked` with every automatic value made explicit, where the model's
    metadata is known: a request for more than the model can have is served by a runner that has all that is possible.
    """
    if asked in runner.equivalent_requests:
        return True
    if asked.require_gpu and not runner.fully_offloaded:
        return False
    if asked.devices is not None and any(gpu not in asked.devices for gpu, _ in runner.placement.gpu_layers):
        return False
    asked = without_what_is_had(runner, asked)
    usual = runner.usual_options
    if explicit is None:
        return serves(runner.effective_options, asked, usual)
    if explicit == runner.launch_options:
        return True
    left_open = [each.name for each in fields(asked) if getattr(asked, each.name) is None]
    least = Options(
        num_ctx=_less(usual.num_ctx, explicit.num_ctx), num_parallel=_less(usual.num_parallel, explicit.num_parallel)
    )
    return serves(runner.effective_options, replace(explicit, **dict.fromkeys(left_open)), least)


def without_what_is_had(runner: Runner | LoadedAs, asked: Options) -> Options:
    """Return the options without those that name what the plan or the engine has chosen for the runner.

    A runner with all layers on GPUs has any larger number of layers too. A GPU to prefer means nothing to a runner on
    the host, and the one that was preferred at the launch has been considered.
    """
    if asked.num_gpu is asked.main_gpu is asked.use_mmap is asked.flash_attention is None:
        return asked  # most requests
    chosen, layers, gpu = runner.chosen_options, asked.num_gpu, asked.main_gpu
    if layers is not None and runner.fully_offloaded and layers >= runner.placement.offloaded:
        layers = None
    if chosen.num_gpu == 0 or gpu == runner.launch_options.main_gpu:
        gpu = None
    return replace(
        asked,
        num_gpu=None if layers == chosen.num_gpu else layers,
        main_gpu=None if gpu == chosen.main_gpu else gpu,
        use_mmap=None if asked.use_mmap is chosen.use_mmap else asked.use_mmap,
        flash_attention=None if asked.flash_attention is chosen.flash_attention else asked.flash_attention,
    )


def serves(loaded: Options, asked: Options, usual: Options = AUTOMATIC) -> bool:
    """Tell whether a runner loaded with the explicit options `loaded` may serve a request for `asked`.

    An option that is not named matches, as does a negative `num_gpu`; but context and slots that are not named are
    those of `usual` at least. A larger context or more slots serve a request for less. All other named options must be
    equal, but for `require_gpu` and `devices`, which depend on the runner's placement. A request for more than the
    model can have is served once its options are resolved.
    """
    return (
        _within(usual.num_ctx if asked.num_ctx is None else asked.num_ctx, loaded.num_ctx)
        and _within(usual.num_parallel if asked.num_parallel is None else asked.num_parallel, loaded.num_parallel)
        and (asked.num_gpu is None or asked.num_gpu < 0 or asked.num_gpu == loaded.num_gpu)
        and asked.num_batch in (None, loaded.num_batch)
        and asked.main_gpu in (None, loaded.main_gpu)
        and asked.num_thread in (None, loaded.num_thread)
        and asked.use_mmap in (None, loaded.use_mmap)
        and asked.flash_attention in (None, loaded.flash_attention)
        and asked.cache_type_k in (None, loaded.cache_type_k)
        and asked.cache_type_v in (None, loaded.cache_type_v)
        and asked.draft_num_predict in (None, loaded.draft_num_predict)
        and asked.context_shift in (None, loaded.context_shift)
    )


def _within(asked: int | None, loaded: int | None) -> bool:
    return asked is None or (loaded is not None and asked <= loaded)


def _less(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else min(one, other)

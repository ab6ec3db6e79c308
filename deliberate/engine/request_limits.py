"""Whether a request fits a model and a cache, before it is taken."""

from __future__ import annotations

import dataclasses

from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.request import Request
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


def check_fits(request: Request, backbone: Backbone, cache: SegmentCache, blocks: int) -> Request:
    """Checks a request against positions, blocks and embeddings.

    Args:
        request: that is to be decoded.
        backbone: of the model.
        cache: of the engine.
        blocks: of it in all.

    Returns:
        The request, which keeps the embeddings of its images.

    Raises:
        DeliberateError: what it exceeds.
    """
    asked, held = request.spec.kv_storage, cache.storage
    if asked is not held:
        raise DeliberateError(
            f"kv_storage={str(asked)!r} in an engine whose cache is {str(held)!r}: all requests "
            "share it; make the engine with cache=model.backbone.new_int8_cache(0, max_running), "
            "or new_block_cache(blocks, storage='int8'), for 'int8', without cache for 'native'"
        )
    if request.spec.drafts is not None and isinstance(cache, BlockCache):
        raise DeliberateError(
            f"drafts={request.spec.drafts!r} in an engine whose cache is in blocks: full blocks "
            "are shared, and drafts by the model itself would lie in them; leave drafts out, or "
            "use a cache of rows"
        )
    given, wanted = len(request.prompt_ids), request.max_new_tokens
    said = f"a prompt of {given} and max_new_tokens {wanted}"
    positions = backbone.learned_positions
    if positions is not None and given + wanted > positions + 1:
        raise DeliberateError(
            f"{said} exceed the model's {positions} positions: shorten one of them"
        )
    needed = cache.blocks_for(given + wanted)
    if needed > blocks:
        raise DeliberateError(
            f"{said} take {needed} blocks and the cache has {blocks}: shorten one of them, or give "
            "the cache more blocks"
        )
    largest = max(request.prompt_ids)
    if largest < backbone.embeddings:
        return request
    lacking = [one for one in request.prompt_ids if not backbone.has_embedding(one)]
    if lacking:
        raise DeliberateError(
            f"token id {lacking[0]} has no embedding: the model has {backbone.embeddings}"
        )
    if request.sampling is not None and request.sampling.needs_ids:
        raise DeliberateError(
            f"{request.sampling.describe()} for a prompt with images: these processors look up the "
            "prompt's ids in the vocabulary; use model.generate, or processors that do not"
        )
    if not request.seen:
        request = dataclasses.replace(request, seen=backbone.hold(request.prompt_ids))
    if any(run.places is not None for run in request.seen):
        backbone.check_places()
    return request

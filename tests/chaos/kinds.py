"""All kinds of faults, and their frequencies."""

from glob import glob

from tests.chaos import nights, on_servers, on_timelines, on_workers
from tests.chaos.faults import ALL, FullSpeed, Kind
from tests.chaos.site import Site
from tests.chaos.wire import Moment
from tests.support.scripted_gateway import error

_NO_ROOM = "select exists (select from vectormill.chunks where state = 'pending' and last_error ~* 'DiskFull')"
_REFUSED_BY_DISK = "select exists (select from vectormill.jobs where state = 'paused' and reason = 'storage_refused')"
_REFUSED = ("gateway_refused",)
_OF_GATEWAY = "j.model_name = 'far'"
_TO_STORE = "j.options->>'output' like 's3://%'"
_TO_DISK = f"j.options->>'output' not like 's3://%' and {ALL}"
_TO_TABLES = f"j.options->>'output' is null and {ALL}"


def _has_disks(site: Site) -> bool:
    return site.tables is not None


KINDS = (
    Kind("worker child killed while it embeds", on_workers.kill_child, 3, expires=True),
    Kind("worker child killed inside COPY", on_workers.strike(Moment.IN_COPY, on_workers.kill), 2, expires=True),
    Kind(
        "worker child killed before COMMIT arrives",
        on_workers.strike(Moment.BEFORE_COMMIT, on_workers.kill),
        2,
        expires=True,
    ),
    Kind(
        "worker child killed before COMMIT's answer",
        on_workers.strike(Moment.AFTER_COMMIT, on_workers.kill),
        2,
        expires=True,
    ),
    Kind("connection cut inside COPY", on_workers.strike(Moment.IN_COPY, on_workers.cut), 6, expires=True),
    Kind(
        "connection cut before COMMIT arrives", on_workers.strike(Moment.BEFORE_COMMIT, on_workers.cut), 6, expires=True
    ),
    Kind(
        "connection cut before COMMIT's answer", on_workers.strike(Moment.AFTER_COMMIT, on_workers.cut), 6, expires=True
    ),
    Kind("worker killed", on_workers.kill_worker, expires=True),
    Kind("worker child frozen past its lease", on_workers.freeze_child, expires=True),
    Kind("worker child frozen inside COPY", on_workers.freeze_in_copy, expires=True),
    Kind("worker child frozen shortly", on_workers.freeze_shortly, 3),
    Kind("rolling restart of a worker", on_workers.rolling_restart),
    Kind("worker's clock hours ahead", on_workers.clock_ahead, possible=lambda _: bool(glob(on_workers.FAKETIME))),
    Kind("dispatcher killed", on_servers.kill_dispatcher, 4),
    Kind("dispatcher frozen, two at once", on_servers.freeze_dispatcher),
    Kind("dispatchers killed while a sync removes keys", nights.kill_in_removal, 2),
    Kind("dispatchers killed while a key is erased", nights.kill_in_forget),
    Kind("command killed while it swaps versions", nights.kill_in_swap),
    Kind("Redis killed", on_servers.kill_redis, 3),
    Kind("Redis frozen", on_servers.freeze_redis, 2),
    Kind("Redis flushed", on_servers.flush_redis, 5),
    Kind("Redis cut off", on_servers.cut_off(lambda site: site.redis_line), 5),
    Kind("Postgres restarted at once", on_servers.restart_postgres, 2, expires=True),
    Kind("backends terminated", on_servers.terminate_backends, 5, expires=True),
    Kind("primary lost, standby promoted without its last second", on_timelines.fail_over, 7, expires=True),
    Kind("Postgres restored, a minute missing", on_timelines.restore, 7, expires=True),
    Kind("half-open connections to Postgres", on_servers.half_open, expires=True),
    Kind(
        "disk full under the tables",
        on_servers.full(lambda site: site.tables, _NO_ROOM),
        of=_TO_TABLES,
        expires=True,
        possible=_has_disks,
    ),
    Kind(
        "disk full under Parquet",
        on_servers.full(lambda site: site.parquet, _REFUSED_BY_DISK),
        of=_TO_DISK,
        pauses=("storage_refused",),
        possible=_has_disks,
    ),
    Kind("object store cut off", on_servers.cut_off(lambda site: site.store_line), 3, of=_TO_STORE),
    Kind("object store: 503", on_servers.refused(lambda site: site.store_line), 3, of=_TO_STORE),
    Kind("worker child killed inside an upload", on_workers.kill_in_upload, expires=True),
    Kind("object store frozen", on_servers.frozen(lambda site: site.store_line), of=_TO_STORE),
    Kind("upstream: 429 storm", on_servers.answering(lambda _: error(429, retry_after="1")), of=_OF_GATEWAY),
    Kind("upstream: 503", on_servers.answering(lambda _: error(503)), 3, of=_OF_GATEWAY),
    Kind("upstream: slow bodies", on_servers.answering(on_servers.slowly, share=0.2), 3, of=_OF_GATEWAY),
    Kind(
        "upstream: broken JSON",
        on_servers.answering(on_servers.broken_json, share=0.5),
        2,
        pauses=_REFUSED,
        of=_OF_GATEWAY,
    ),
    Kind(
        "upstream: too few vectors",
        on_servers.answering(on_servers.too_few, share=0.5),
        2,
        pauses=_REFUSED,
        of=_OF_GATEWAY,
    ),
    Kind(
        "upstream: not a number",
        on_servers.answering(on_servers.not_finite, share=0.5),
        2,
        pauses=_REFUSED,
        of=_OF_GATEWAY,
    ),
    Kind("upstream: no answer", on_servers.answering(on_servers.no_answer, share=0.7), 3, of=_OF_GATEWAY),
)

#: Kinds for default settings, with the recovery times that are promised there.
AT_DEFAULTS = (
    Kind("machine of a worker dead", on_workers.kill_machine, 2, most_seconds=45, expires=True),
    Kind("worker child killed while it embeds", on_workers.kill_child, 2, most_seconds=45, expires=True),
    Kind("worker child frozen shortly", on_workers.freeze_shortly),
    Kind("Redis flushed", on_servers.at_full_speed(on_servers.flush_redis), back=FullSpeed, most_seconds=15),
    Kind("command killed while it swaps versions", nights.kill_in_swap),
    Kind("Redis killed", on_servers.at_full_speed(on_servers.kill_redis), back=FullSpeed, most_seconds=30),
)

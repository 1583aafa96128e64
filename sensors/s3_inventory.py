"""`s3_inventory_sensor`: lists the watched prefixes for uploads and removals that events have missed."""

import dagster as dg

from media_assets.orchestration.partitions import add_partitions
from resources.errors import printable
from resources.ingest.inventory import Cursor, Inventory, Report
from resources.library import Library
from resources.settings import Settings

NAME = "s3_inventory_sensor"
INTERVAL_S = 30


def build_s3_inventory_sensor(settings: Settings) -> dg.SensorDefinition:
    """The safety net below the event sensor; it runs where `ingestion.prefixes` names something, and requests no runs.

    A tick works for `ingestion.tick_budget_s`; the next one goes on where it ended.
    """
    configured = bool(settings.ingestion.prefixes)

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING if configured else dg.DefaultSensorStatus.STOPPED,
        description="Lists s3:// prefixes page by page and registers uploads and removals that events have missed.",
    )
    def s3_inventory_sensor(
        context: dg.SensorEvaluationContext, media: dg.ResourceParam[Library]
    ) -> dg.SensorResult | dg.SkipReason:
        if not media.settings.ingestion.prefixes:
            return dg.SkipReason("ingestion.prefixes names no s3:// location to list.")

        def announce(media_ids: list[str]) -> None:
            add_partitions(context.instance, media.settings, media_ids)

        inventory = Inventory(media.registry, media.settings.s3, media.settings.ingestion, announce)
        cursor, reports = inventory.tick(Cursor.parse(context.cursor))
        for report in reports:
            if report.error:
                context.log.error(sentence(report))
            elif not report.between or report.new or report.removed:  # else a log file for every tick, about nothing
                context.log.info(sentence(report))
        text = " ".join(sentence(report) for report in reports)
        return dg.SensorResult(cursor=cursor.model_dump_json(), skip_reason=dg.SkipReason(text))

    return s3_inventory_sensor


def sentence(report: Report) -> str:
    """What one tick did with one prefix, for the tick's log."""
    where = printable(report.prefix, 200)
    if report.error:
        return f"{where}: {report.error} {report.pages} pages were done before."
    state = "complete" if report.finished else "between passes" if report.between else "goes on"
    return (
        f"{where}: {state}, {report.pages} pages, {report.keys} keys, {report.new} new, "
        f"{report.missed} of them missed by events, {report.removed} removed unnoticed."
    )

"""The express run in this process, with real models: an upload goes all the way, and no model is loaded twice."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from cli.searching import open_search
from jobs.express import EXPRESS, build_express_job
from media_assets.orchestration.groups import LOADED_TAG
from media_assets.orchestration.partitions import add_partitions
from media_assets.schemas import PER_MEDIA
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.models.registry import ModelRegistry


def test_an_upload_is_searchable_and_the_next_one_finds_the_models_warm(
    library: Library, models: ModelRegistry, tmp_path: Path
) -> None:
    """Given two documents, when each has an express run in the same process, then both are found, and the second run
    says that it loaded nothing."""
    library.__dict__["models"] = ModelRegistry(models.settings)  # the session's weights, but nothing loaded
    job = dg.Definitions(
        jobs=[build_express_job(library.settings)],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
    ).resolve_job_def("process_express")
    loaded = []
    with dg.DagsterInstance.ephemeral() as instance:
        for name, words in (("harbour", "Boats leave the harbour at dawn."), ("oven", "Bread rests before baking.")):
            document = tmp_path / f"{name}.txt"
            document.write_text(words)
            (key,) = library.registry.add([found for found in discover([str(document)]) if isinstance(found, Upload)])
            add_partitions(instance, library.settings, [key])
            config = {"ops": {EXPRESS: {"config": {"keys": [key]}}}}
            result = job.execute_in_process(instance=instance, run_config=config)
            assert result.success
            records = library.outcomes.load([key])
            assert {asset for _, asset in records} == set(PER_MEDIA)
            assert all(record.status.done for record in records.values())
            assert open_search(library).search(words, 1).hits[0].media_id == key
            run = instance.get_run_by_id(result.run_id)
            assert run is not None
            loaded.append(int(run.tags[LOADED_TAG]))
    assert loaded[0] > 0
    assert loaded[1] == 0
    assert set(library.models.loads.values()) == {1}

"""What `deploy/` holds: valid by its schemas, and used by the real launchers on stand-ins of AWS and Kubernetes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dagster as dg
import jsonschema
import pytest
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from jobs.run_coordinator import NeedsRunCoordinator
from jobs.run_launcher import WarmRunLauncher
from media_assets.definitions import build
from resources.library import Library
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
DEPLOY = PROJECT / "deploy"
NAMESPACE = "media-assets"
KUBERNETES = "1.33"
REGION = "eu-central-1"
OVERRIDES_LIMIT = 8192  # characters of ECS' container overrides


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


# -- Dagster: the four instance files ----------------------------------------------------------------------------


@pytest.fixture
def instance_of(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dg.DagsterInstance]:
    """Opens the instance of an executor's dagster.yaml, on a database of its own."""
    monkeypatch.setenv("MEDIA_DATABASE_URL", database_url)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))

    def opened(name: str) -> dg.DagsterInstance:
        (tmp_path / "dagster.yaml").write_bytes((DEPLOY / name / "dagster.yaml").read_bytes())
        return dg.DagsterInstance.from_config(str(tmp_path))

    return opened


@pytest.mark.parametrize("path", [PROJECT / "dagster.yaml", *sorted(DEPLOY.glob("*/dagster.yaml"))], ids=str)
def test_every_dagster_yaml_is_valid(path: Path, tmp_path: Path) -> None:
    """Given an instance file, then Dagster reads it, and its classes and limits are what the executors rely on."""
    (tmp_path / "dagster.yaml").write_bytes(path.read_bytes())
    reference = InstanceRef.from_dir(str(tmp_path))
    launcher, coordinator = reference.run_launcher_data, reference.run_coordinator_data
    assert launcher is not None
    assert coordinator is not None
    assert find_spec(launcher.module_name) is not None
    assert reference.storage_data is not None
    assert reference.storage_data.class_name == "PooledPostgresStorage"
    monitoring = reference.settings["run_monitoring"]
    assert monitoring["enabled"]
    assert monitoring["free_slots_after_run_end_seconds"]
    if path.parent == PROJECT:
        assert reference.settings["concurrency"]["pools"] == {"default_limit": 1, "granularity": "run"}
    else:
        assert isinstance(reference.run_coordinator, NeedsRunCoordinator)
        limits = reference.settings["concurrency"]["runs"]["tag_concurrency_limits"]
        assert {"key": "media/group", "value": "library", "limit": 1} in limits
        assert any(entry["key"] == "media/compute" and entry["value"] == "gpu" for entry in limits)


def test_runs_beside_a_ray_cluster_start_in_processes(instance_of: Callable[[str], dg.DagsterInstance]) -> None:
    """Given the instance file for Ray, then the run's process is this machine's; only its step goes to the cluster."""
    with instance_of("ray") as instance:
        assert isinstance(instance.run_launcher, WarmRunLauncher)


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dg.Definitions]:
    """The project's definitions for an executor, with the models of GPUs."""

    def built(name: str) -> dg.Definitions:
        monkeypatch.setenv("MEDIA_COMPUTE__EXECUTOR", name)
        monkeypatch.setenv("MEDIA_PROFILE", "gpu")
        return build(Library(Settings.load(tmp_path / "home")))

    return built


def queued(instance: dg.DagsterInstance, job: dg.JobDefinition, tags: Mapping[str, str] = {}) -> dg.DagsterRun:
    """A run as a sensor, a backfill or the UI creates it, through the instance's run queue."""
    pointer = ModuleCodePointer("media_assets.definitions", "defs", None)
    origin = RepositoryPythonOrigin(executable_path="python", code_pointer=pointer, container_image="registry/cpu:1")
    server = GrpcServerCodeLocationOrigin("code", 4000, location_name="media-assets")
    run = instance.create_run_for_job(
        job,
        tags={**job.tags, **tags},
        asset_selection=job.asset_selection,
        job_code_origin=JobPythonOrigin(job_name=job.name, repository_origin=origin),
        remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(server, "__repository__"), job.name),
    )
    instance.run_coordinator.submit_run(dg.SubmitRunContext(run, workspace=None))  # type: ignore[arg-type]
    stored = instance.get_run_by_id(run.run_id)
    assert stored is not None
    assert stored.status is dg.DagsterRunStatus.QUEUED
    return stored


def backfill_job(definitions: dg.Definitions, *assets: str) -> dg.JobDefinition:
    """Dagster's own job over assets, as backfills and the UI's `Materialize` run it: it has no tags."""
    everything = definitions.resolve_implicit_global_asset_job_def()
    return everything.get_subset(asset_selection={dg.AssetKey(name) for name in assets})


def test_a_run_over_several_groups_goes_where_the_most_demanding_may(
    instance_of: Callable[[str], dg.DagsterInstance], definitions: Callable[[str], dg.Definitions]
) -> None:
    """Given one run over a CPU and a GPU group, then it is tagged as the latter; one that says its kind is left so."""
    project = definitions("k8s")
    with instance_of("ray") as instance:
        both = queued(instance, backfill_job(project, "media", "shots"))
        assert (both.tags["media/compute"], both.tags["media/group"]) == ("gpu", "analyse")
        own = queued(instance, backfill_job(project, "shots"), {"media/compute": "elsewhere"})
        assert own.tags["media/compute"] == "elsewhere"
        assert "dagster-k8s/config" not in own.tags
        nothing = queued(instance, dg.GraphDefinition("nothing").to_job())
        assert "media/compute" not in nothing.tags


# -- ECS ---------------------------------------------------------------------------------------------------------


def test_the_cloudformation_template_has_no_finding() -> None:
    """Given the template, then AWS' resource schemas and the linter's rules are content with it."""
    from cfnlint.api import lint_file

    assert [str(finding) for finding in lint_file(DEPLOY / "ecs" / "template.yaml")] == []


def test_what_the_stand_in_of_aws_ignores_is_right_in_the_template() -> None:
    """Given the template, then only GPU runs ask for a GPU, on a machine, and the queue is told of every upload."""
    from cfnlint.decode import cfn_yaml

    resources = cfn_yaml.load(str(DEPLOY / "ecs" / "template.yaml"))["Resources"]
    for name, count, kinds in (("CpuRun", 0, ["FARGATE"]), ("GpuRun", 1, ["EC2"])):
        task = resources[name]["Properties"]
        (container,) = task["ContainerDefinitions"]
        assert task["RequiresCompatibilities"] == kinds
        assert [entry["Type"] for entry in container.get("ResourceRequirements", [])] == ["GPU"] * count
    told = resources["Uploads"]["Properties"]["NotificationConfiguration"]["QueueConfigurations"]
    assert sorted(entry["Event"] for entry in told) == ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]
    assert {json.dumps(entry["Queue"]) for entry in told} == {'{"Fn::GetAtt": ["Events", "Arn"]}'}
    assert resources["Uploads"]["DependsOn"] == "EventsPolicy"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The template deployed into moto, the daemon's task running, and a GPU machine in the cluster; stack outputs."""
    import boto3
    from moto import mock_aws
    from moto.ec2 import utils

    for name, value in {
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "MEDIA_ECS_TASK_DEFINITION": "media-assets-cpu",
    }.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        ec2, ecs, stacks = (boto3.client(name) for name in ("ec2", "ecs", "cloudformation"))
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
        secret = boto3.client("secretsmanager").create_secret(Name="database", SecretString="postgresql://x/y")["ARN"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        boto3.client("ssm").put_parameter(Name="/gpu-image", Value=image, Type="String")
        parameters = {
            "VpcId": vpc,
            "SubnetIds": subnet,
            "CpuImage": "registry/cpu:1",
            "CudaImage": "registry/cuda:1",
            "DatabaseUrlSecretArn": secret,
            "GpuImageId": "/gpu-image",
        }
        stacks.create_stack(
            StackName="media-assets",
            TemplateBody=(DEPLOY / "ecs" / "template.yaml").read_text(),
            Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in parameters.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        (stack,) = stacks.describe_stacks(StackName="media-assets")["Stacks"]
        outputs = {entry["OutputKey"]: entry["OutputValue"] for entry in stack["Outputs"]}
        cluster = outputs["ClusterName"]
        (machine,) = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="g5.xlarge")["Instances"]
        identity = json.dumps(
            utils.generate_instance_identity_document(boto3.resource("ec2").Instance(machine["InstanceId"]))
        )
        ecs.register_container_instance(cluster=cluster, instanceIdentityDocument=identity)
        groups = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["SecurityGroups"]
        group = next(found["GroupId"] for found in groups if "nothing may connect" in found["Description"])
        network = {"subnets": [subnet], "securityGroups": [group], "assignPublicIp": "DISABLED"}
        (control,) = ecs.run_task(
            cluster=cluster,
            taskDefinition="media-assets-control",
            launchType="FARGATE",
            networkConfiguration={"awsvpcConfiguration": network},
        )["tasks"]
        answer = {"Cluster": cluster, "TaskARN": control["taskArn"]}
        with http_server(lambda method, path, body: answer) as (url, _):
            monkeypatch.setenv("ECS_CONTAINER_METADATA_URI_V4", url)
            yield {**outputs, "secret": secret}


def launched(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dict[str, Any]:
    """The ECS task that the instance's launcher starts for a run."""
    import boto3

    instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    stored = instance.get_run_by_id(run.run_id)
    assert stored is not None
    where = {"cluster": stored.tags["ecs/cluster"], "tasks": [stored.tags["ecs/task_arn"]]}
    (task,) = boto3.client("ecs").describe_tasks(**where, include=["TAGS"])["tasks"]
    return task


def test_ecs_runs_are_tasks_of_the_kind_their_tags_say(
    aws: dict[str, Any],
    instance_of: Callable[[str], dg.DagsterInstance],
    definitions: Callable[[str], dg.Definitions],
) -> None:
    """Given the deployed template, then GPU runs, of jobs or backfills, are GPU tasks, and all others CPU tasks."""
    from dagster_aws.ecs import EcsRunLauncher

    project = definitions("ecs")
    with instance_of("ecs") as instance:
        assert isinstance(instance.run_launcher, EcsRunLauncher)
        analyse = launched(instance, queued(instance, project.resolve_job_def("process_analyse")))
        decode = launched(instance, queued(instance, project.resolve_job_def("process_decode")))
        backfill = launched(instance, queued(instance, backfill_job(project, "shots", "ocr_text")))
        rebuild = launched(instance, queued(instance, backfill_job(project, "near_duplicates")))
        for task, family, provider in (
            (analyse, "gpu", "media-assets-gpu"),
            (backfill, "gpu", "media-assets-gpu"),
            (decode, "cpu", None),
            (rebuild, "cpu", None),
        ):
            assert f":task-definition/media-assets-{family}:" in task["taskDefinitionArn"]
            assert task.get("capacityProviderName") == provider
            assert (task["launchType"] or None) == (None if provider else "FARGATE")
            (override,) = task["overrides"]["containerOverrides"]
            assert override["name"] == "run"
            assert "execute_run" in override["command"]
            assert (override["cpu"], override["memory"]) == (2048, 4096)
            assert len(json.dumps(task["overrides"])) < OVERRIDES_LIMIT
            assert {tag["key"]: tag["value"] for tag in task["tags"]}["media/compute"] == family
        assert os.environ["MEDIA_DATABASE_URL"] not in json.dumps(analyse["overrides"])


def test_the_stack_hands_out_secrets_by_reference_and_has_the_queue(aws: dict[str, Any]) -> None:
    """Given the deployed template, then runs get the database by its secret, and failing events are set aside."""
    import boto3

    ecs, sqs = boto3.client("ecs"), boto3.client("sqs")
    for family in ("cpu", "gpu"):
        task = ecs.describe_task_definition(taskDefinition=f"media-assets-{family}")["taskDefinition"]
        (container,) = task["containerDefinitions"]
        assert container["secrets"] == [{"name": "MEDIA_DATABASE_URL", "valueFrom": aws["secret"]}]
        environment = {entry["name"]: entry["value"] for entry in container["environment"]}
        assert environment["MEDIA_STORAGE_URL"] == f"s3://{aws['DerivedBucket']}/library"
        assert environment["MEDIA_INGESTION__QUEUE_URL"] == aws["EventsQueue"]
    queue = sqs.get_queue_attributes(QueueUrl=aws["EventsQueue"], AttributeNames=["QueueArn", "RedrivePolicy"])[
        "Attributes"
    ]
    assert json.loads(queue["RedrivePolicy"])["maxReceiveCount"] == 5


def test_the_settings_of_every_container_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Given the variables of the template, of Kubernetes and of compose, then all load as settings."""
    config_map = next(d for d in documents(DEPLOY / "k8s" / "media-assets.yaml") if d["kind"] == "ConfigMap")["data"]
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["code"]["environment"]
    template = (DEPLOY / "ecs" / "template.yaml").read_text()
    ecs = dict(re.findall(r"\{Name: (MEDIA_\w+), Value: ([^!}]+)\}", template))
    known = {f"MEDIA_{name.upper()}" for name in Settings.model_fields} | {"MEDIA_CODE_HOST"}
    for environment in (config_map, compose, ecs):
        for name, value in environment.items():
            assert name.split("__")[0] in known or name.startswith(("AWS_", "MEDIA_ECS_", "MEDIA_K8S_")), name
            monkeypatch.setenv(name, value)
        Settings.load(tmp_path)


# -- Kubernetes --------------------------------------------------------------------------------------------------


Answer = Callable[[str, str, bytes], Any]


class http_server:  # noqa: N801 - used like a function
    """A server on loopback that answers JSON; a context manager over its URL and what it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen.append((self.command, self.path, json.loads(body) if body else None))
                said = json.dumps(answer(self.command, self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = respond  # noqa: N815 - the library's names

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> tuple[str, list[tuple[str, str, Any]]]:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}", self.seen

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def valid(document: Mapping[str, Any]) -> None:
    """Raise unless a Kubernetes object follows the schema of its kind, without unknown fields."""
    import kubernetes_validate

    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pods(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pod that a workload makes."""
    if document["kind"] in ("Deployment", "Job"):
        yield document["spec"]["template"]["spec"]


def restricted(pod: Mapping[str, Any]) -> None:
    """Assert what Pod Security's level `restricted` asks for."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_manifests_are_valid_and_unprivileged() -> None:
    """Given the manifests, then each follows its schema, every pod meets the level its namespace enforces."""
    manifests = documents(DEPLOY / "k8s" / "media-assets.yaml")
    names = {(document["kind"], document["metadata"]["name"]) for document in manifests}
    for document in manifests:
        valid(document)
        assert document["metadata"].get("namespace", NAMESPACE) == NAMESPACE
        for pod in pods(document):
            restricted(pod)
            assert ("ServiceAccount", pod["serviceAccountName"]) in names
            for container in pod["containers"]:
                assert "livenessProbe" in container
                assert container["resources"]["limits"]["memory"]
    (kustomization,) = documents(DEPLOY / "k8s" / "kustomization.yaml")
    assert all((DEPLOY / "k8s" / name).is_file() for name in kustomization["resources"])
    assert [entry["name"] for entry in kustomization["configMapGenerator"]] == ["dagster-instance"]
    assert ("ServiceAccount", "media-assets-run") in names


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, Any]]]:
    """A stand-in of the Kubernetes API, found by the launcher's client; yields what it is sent."""
    from dagster_k8s import launcher
    from kubernetes.client import Configuration

    with http_server(lambda method, path, body: json.loads(body or b"{}")) as (url, seen):
        before = Configuration.get_default_copy()
        configuration = Configuration(host=url)
        monkeypatch.setattr(launcher, "load_kubernetes_config", lambda **_: Configuration.set_default(configuration))
        yield seen
        Configuration.set_default(before)


def test_kubernetes_runs_are_valid_jobs_with_what_their_tags_say(
    cluster: list[tuple[str, str, Any]],
    instance_of: Callable[[str], dg.DagsterInstance],
    definitions: Callable[[str], dg.Definitions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given the launcher of the instance file, then a GPU run's pod gets a GPU where there is one."""
    from dagster_k8s import K8sRunLauncher

    monkeypatch.setenv("MEDIA_K8S_NAMESPACE", NAMESPACE)
    monkeypatch.setenv("MEDIA_K8S_IMAGE", "media-assets:cuda")
    monkeypatch.setenv("MEDIA_COMPUTE__GROUPS", json.dumps({"analyse": {"gpu_memory_bytes": 24 * 2**30}}))
    project = definitions("k8s")
    with instance_of("k8s") as instance:
        assert isinstance(instance.run_launcher, K8sRunLauncher)
        for job in (project.resolve_job_def("process_analyse"), backfill_job(project, "ocr_text")):
            instance.run_launcher.launch_run(LaunchRunContext(queued(instance, job), workspace=None))
        instance.run_launcher.launch_run(
            LaunchRunContext(queued(instance, project.resolve_job_def("process_label")), workspace=None)
        )
    sent = [
        body
        for method, path, body in cluster
        if (method, path) == ("POST", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs")
    ]
    assert len(sent) == 3
    manifests = documents(DEPLOY / "k8s" / "media-assets.yaml")
    labels = {"app.kubernetes.io/component": "run_worker"}
    assert any(d["kind"] == "NetworkPolicy" and d["spec"]["podSelector"]["matchLabels"] == labels for d in manifests)
    for job, has_gpu in zip(sent, (True, True, False), strict=True):
        valid(job)
        pod = job["spec"]["template"]["spec"]
        restricted(pod)
        assert job["spec"]["template"]["metadata"]["labels"].items() >= labels.items()
        assert pod["serviceAccountName"] == "media-assets-run"
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if has_gpu else None)
        assert "execute_run" in container["args"]
        assert [entry["secretRef"]["name"] for entry in container["envFrom"] if "secretRef" in entry] == [
            "media-assets"
        ]
        tolerated = [entry["key"] for entry in pod.get("tolerations", [])]
        assert tolerated == (["nvidia.com/gpu"] if has_gpu else [])
        assert pod.get("nodeSelector") == ({"nvidia.com/gpu.present": "true"} if has_gpu else None)
        assert ("nvidia.com/gpu.memory" in json.dumps(pod.get("affinity", {}))) == has_gpu


# -- compose, Ray, images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_file_holds_together(name: str) -> None:
    """Given a compose file, then what its services refer to exists, no password has a default, and all are watched."""
    (base,) = documents(DEPLOY / "compose.yaml")
    (document,) = documents(DEPLOY / name)
    services = base["services"]
    assert set(document["services"]) <= set(services)
    for service in document["services"].values():
        if build_of := service.get("build"):
            stages = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
            assert build_of["target"] in stages
    if name != "compose.yaml":
        return
    for service in services.values():
        assert "image" in service
        for other, condition in service.get("depends_on", {}).items():
            wanted = condition["condition"]
            assert other in services
            if wanted == "service_healthy" and not services[other]["image"].startswith("media-assets"):
                assert "test" in services[other]["healthcheck"]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in base["volumes"]
        for config in service.get("configs", []):
            assert config["source"] in base["configs"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
    for variable in re.findall(r"\$\{(\w+)[^}]*\}", (DEPLOY / "compose.yaml").read_text()):
        assert variable in {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert ":-" not in (DEPLOY / "compose.yaml").read_text()


def test_the_ray_cluster_follows_rays_schema() -> None:
    """Given the cluster file, then Ray accepts it, the head does no work and GPUs have nodes of their own."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    (document,) = documents(DEPLOY / "ray" / "cluster.yaml")
    jsonschema.validate(document, schema)
    nodes = document["available_node_types"]
    assert document["head_node_type"] in nodes
    assert {name: kind["resources"] for name, kind in nodes.items()}["head"] == {"CPU": 0, "GPU": 0}
    assert [name for name, kind in nodes.items() if kind["resources"]["GPU"]] == ["gpu"]


def test_the_image_takes_extras_that_exist_and_runs_as_nobody() -> None:
    """Given the Dockerfile, then its extras are the project's, CPU and CUDA do not mix, and no final stage is root."""
    text = (DEPLOY / "Dockerfile").read_text()
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL))
    for stage, wanted, unwanted in (("cpu-packages", "cpu", "gpu"), ("cuda-packages", "gpu", "cpu")):
        named = set(re.findall(r"--extra (\w+)", stages[stage]))
        assert {wanted, "ray", "k8s"} <= named <= set(extras) - {unwanted, "dev"}
    for stage in ("cpu", "cuda"):
        assert "USER 10001:10001" in stages[stage]
        assert "HEALTHCHECK" in stages[stage]
    assert any(extra.startswith("faiss-gpu") for extra in extras["gpu"])


@pytest.mark.parametrize(("name", "source"), [("", "dagster.yaml"), ("ecs", "deploy/ecs/dagster.yaml")])
def test_a_container_starts_with_the_instance_file_of_its_executor(name: str, source: str, tmp_path: Path) -> None:
    """Given the entry point, then the executor's file is put in place once, and the command takes over."""
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path), **({"MEDIA_COMPUTE__EXECUTOR": name} if name else {})}
    command = [DEPLOY / "entrypoint.sh", "sh", "-c", "echo $DAGSTER_HOME; exit 3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (3, str(tmp_path))
    assert (tmp_path / "dagster.yaml").read_text() == (PROJECT / source).read_text()
    (tmp_path / "dagster.yaml").write_text("mounted")
    subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (tmp_path / "dagster.yaml").read_text() == "mounted"


def test_the_workspace_names_a_code_server_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given MEDIA_CODE_HOST, then webserver and daemon look for the code location there."""
    from dagster._core.workspace.load import location_origins_from_yaml_paths

    monkeypatch.setenv("MEDIA_CODE_HOST", "code.example")
    (origin,) = location_origins_from_yaml_paths([str(DEPLOY / "workspace.yaml")])
    assert (origin.host, origin.port) == ("code.example", 4000)  # type: ignore[attr-defined]

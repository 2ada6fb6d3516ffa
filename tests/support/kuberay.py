"""The fields of KubeRay's RayService, with their types: what the CRD `rayservices.ray.io` of group version v1 takes.

Written from KubeRay's API reference for ray.io/v1 and from the schema in its Helm chart, which is a megabyte because
it repeats Kubernetes' own types: those are open here, and pod templates are checked by Kubernetes' schema. Newer
fields, such as upgradeStrategy and authOptions, are left out, so that the manifest goes with older operators. The API
server drops fields that the CRD does not know; here they are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)]
Texts = dict[str, Annotated[str, Field(strict=True)]]
Flag = Annotated[bool, Field(strict=True)]
OfKubernetes = dict[str, Any]


class Part(BaseModel):
    """A part of the schema: no field that is not named."""

    model_config = ConfigDict(extra="forbid")


class AutoscalerOptions(Part):
    resources: OfKubernetes | None = None
    image: str | None = None
    imagePullPolicy: str | None = None  # noqa: N815
    securityContext: OfKubernetes | None = None  # noqa: N815
    idleTimeoutSeconds: Count | None = None  # noqa: N815
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None  # noqa: N815
    env: list[OfKubernetes] | None = None
    envFrom: list[OfKubernetes] | None = None  # noqa: N815
    volumeMounts: list[OfKubernetes] | None = None  # noqa: N815


class HeadGroup(Part):
    template: OfKubernetes
    rayStartParams: Texts  # noqa: N815
    headService: OfKubernetes | None = None  # noqa: N815
    enableIngress: Flag | None = None  # noqa: N815
    serviceType: str | None = None  # noqa: N815


class ScaleStrategy(Part):
    workersToDelete: list[str] | None = None  # noqa: N815


class WorkerGroup(Part):
    groupName: str  # noqa: N815
    minReplicas: Count  # noqa: N815
    maxReplicas: Count  # noqa: N815
    rayStartParams: Texts  # noqa: N815
    template: OfKubernetes
    replicas: Count | None = None
    numOfHosts: Count | None = None  # noqa: N815
    idleTimeoutSeconds: Count | None = None  # noqa: N815
    suspend: Flag | None = None
    scaleStrategy: ScaleStrategy | None = None  # noqa: N815


class Cluster(Part):
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup] | None = None  # noqa: N815
    rayVersion: Annotated[str, Field(strict=True)] | None = None  # noqa: N815
    enableInTreeAutoscaling: Flag | None = None  # noqa: N815
    autoscalerOptions: AutoscalerOptions | None = None  # noqa: N815
    headServiceAnnotations: Texts | None = None  # noqa: N815
    suspend: Flag | None = None


class ServiceSpec(Part):
    serveConfigV2: Annotated[str, Field(strict=True)]  # noqa: N815
    rayClusterConfig: Cluster  # noqa: N815
    serveService: OfKubernetes | None = None  # noqa: N815


class RayService(Part):
    """The manifest."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: OfKubernetes
    spec: ServiceSpec

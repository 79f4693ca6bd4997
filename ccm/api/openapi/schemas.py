"""The JSON schemas of the models, collected from all operations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from ccm.api.openapi.policy import describe_policy

Mode = Literal["validation", "serialization"]
Schema = dict[str, Any]
PREFIX = "#/components/schemas/"


class _Generator(GenerateJsonSchema):
    """Generates schemas as clients and their generators need them."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """Leave out the titles that pydantic derives from the names of fields, because they add nothing."""
        return False

    def dict_schema(self, schema: Any) -> Schema:
        """Return the schema of a dict. `patternProperties`, as pydantic has it, would allow all other names too."""
        generated = super().dict_schema(schema)
        for pattern, values in generated.pop("patternProperties", {}).items():
            generated["propertyNames"] = {**generated.get("propertyNames", {}), "pattern": pattern}
            generated["additionalProperties"] = values
        return generated


class Schemas:
    """The JSON schemas of some types, with those of all models that they use.

    Args:
        types: each under a key, with the direction: `validation` for what clients send, `serialization` for the rest.
    """

    def __init__(self, types: dict[str, tuple[Mode, Any]]) -> None:
        inputs = [(key, mode, TypeAdapter(described)) for key, (mode, described) in types.items()]
        found, definitions = TypeAdapter.json_schemas(
            inputs, ref_template=PREFIX + "{model}", schema_generator=_Generator
        )
        self._schemas = {key: schema for (key, _), schema in found.items()}
        self._components: dict[str, Schema] = definitions["$defs"]
        self._inlined: set[str] = set()
        for component in self._components.values():
            component.pop("title", None)
            if "description" in component:
                # The further paragraphs of a docstring are for those who read the code.
                component["description"] = component["description"].partition("\n\n")[0].replace("\n", " ")
        describe_policy(self._components)

    def __getitem__(self, key: str) -> Schema:
        return self._schemas[key]

    def add(self, name: str, schema: Schema) -> Schema:
        """Add a component. Return the reference to it."""
        if self._components.setdefault(name, schema) != schema:
            raise ValueError(f"two schemas have the name {name}")
        return {"$ref": PREFIX + name}

    def inline(self, key: str) -> Schema:
        """Return the component that a key refers to, which will not be among the components."""
        name = self._schemas[key]["$ref"].removeprefix(PREFIX)
        self._inlined.add(name)
        return self._components[name]

    def components(self) -> dict[str, Schema]:
        """Return the components by name."""
        return {name: schema for name, schema in sorted(self._components.items()) if name not in self._inlined}


def without_null(schema: Schema) -> Schema:
    """Return the schema of a parameter, which is left out and never null."""
    alternatives = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    if rest.get("default", ...) is None:
        del rest["default"]
    if len(alternatives) == 1:
        return {**alternatives[0], **rest}
    return {"anyOf": alternatives, **rest} if alternatives else rest

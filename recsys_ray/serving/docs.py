"""The documentation page of the service: one file, made from its OpenAPI document, with nothing from elsewhere."""

from __future__ import annotations

from typing import Any

from recsys_ray.pages import render_page

# The page holds its own style and script, and may call this service; it can fetch nothing else.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def docs_page(document: dict[str, Any]) -> str:
    """The HTML page of an OpenAPI document: every operation with its fields, answers and requests to send."""
    schemas = document["components"]["schemas"]
    operations = [_operation(method, path, operation, schemas)
                  for path, methods in document["paths"].items() for method, operation in methods.items()]
    return render_page(__name__, "docs.html", info=document["info"], operations=operations, schemas=[
        {"name": name, "description": schema.get("description", ""), "fields": _fields(schema)}
        for name, schema in sorted(schemas.items())])


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    parameters = [{"name": one["name"], "type": _type(one["schema"]), "required": one["required"],
                   "default": one["schema"].get("default"), "where": one["in"], "note": one.get("description", "")}
                  for one in operation.get("parameters", [])]
    return {"method": method.upper(), "path": path, "description": operation.get("description", ""),
            "fields": parameters + _fields(body.get("schema", {})), "parameters": parameters,
            "examples": [example["value"] for example in body.get("examples", {}).values()],
            "answers": [{"status": status, "type": _type(answer["content"]["application/json"]["schema"])}
                        for status, answer in operation["responses"].items()]}


def _fields(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", [])
    return [{"name": name, "type": _type(field), "required": name in required, "default": field.get("default"),
             "where": "body", "note": field.get("description", "")}
            for name, field in schema.get("properties", {}).items()]


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words: `list of FacetCount`, `number or null`, `integer 1 to 100`."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" {low:g} to {high:g}" if low is not None and high is not None else ""
    return f"{schema.get('type', 'anything')}{bounds}"

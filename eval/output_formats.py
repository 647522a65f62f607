"""What a model writes for a call, per prompt format, read into a ToolCall."""
from data.tool_calls import ToolCall, parse_tool_call
from eval.plain_calls import parse_plain_call

OUTPUT_FORMATS = ("tl", "plain")


def parse_output(output: str, output_format: str) -> ToolCall:
    """Parse a model's raw output: `tl` is `name(p="v")`, `plain` the bundled base model's `name(p: "v").`.

    Raises ToolCallError with the reason if the output is not exactly one call, ValueError for an unknown format.
    """
    if output_format == "tl":
        return parse_tool_call(output)
    if output_format == "plain":
        return parse_plain_call(output)
    raise ValueError(f"found format {output_format!a}, expected one of {', '.join(OUTPUT_FORMATS)}")

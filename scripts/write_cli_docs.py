"""Write docs/cli.md from the program's own help. Run: python -m scripts.write_cli_docs"""

from pathlib import Path

from typer.testing import CliRunner

from tinier.cli.main import VERBS, app


def cli_page() -> str:
    lines = ["# The command line", "", "Written by `python -m scripts.write_cli_docs`; a test keeps "
             "it equal to the program.", ""]  # fmt: skip
    for arguments in [[], *[[verb] for verb in VERBS]]:
        # a fixed width, so that the page does not depend on the terminal that wrote it
        done = CliRunner().invoke(
            app, [*arguments, "--help"], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"},
            prog_name="tinier",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        lines += [
            f"## {' '.join(['tinier', *arguments])}",
            "",
            "```",
            done.output.strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "cli.md"
    page.write_text(cli_page(), encoding="utf-8")
    print(f"wrote {page}")

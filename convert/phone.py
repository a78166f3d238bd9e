"""A model for phones: 4 bits, and 16-bit floats that every phone's GPU computes with.

    python convert/phone.py SOURCE OUT [--calibration TEXT]

With a calibration text, embedding, head and the parts that suffer most get 6 bits, in no more
bytes than 5 bits for all.
"""

from mlx_stream.cli.convert import Calibration, Force, Out, Report, Source, convert, run_script


def phone(
    source: Source,
    out: Out,
    calibration: Calibration = None,
    report: Report = None,
    force: Force = False,
) -> None:
    """Convert SOURCE for a phone: 4 bits, or 4 and 6 where a calibration text says."""
    convert(
        source,
        out,
        recipe="sensitive_4_6" if calibration else "uniform_4",
        dtype="float16",
        calibration=calibration,
        report=report,
        force=force,
    )


if __name__ == "__main__":
    run_script(phone)

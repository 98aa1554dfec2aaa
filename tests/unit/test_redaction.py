"""What gives access to a store never reaches an error line, and names of files do."""

import pickle

import pytest

from pipeline.records import LONGEST_MESSAGE, InputError
from pipeline.redaction import redacted

SECRETS = [
    ("https://me:s3cr3t@host/a.json: no such file", "https://***@host/a.json: no such file"),
    ("https://me:p@ss-s3cr3t@host/a.json", "https://***@host/a.json"),
    ("s3://AKIAX:s3cr3t/with+slash@bucket/dump", "s3://***@bucket/dump"),
    ("https://s3cr3t@host/a", "https://***@host/a"),
    ("https://h/a.json?sig=s3cr3t&se=2030: cannot be read", "https://h/a.json?***: cannot be read"),
    ("https://h/a?X-Amz-Credential=A%2FB&X-Amz-Signature=s3cr3t", "https://h/a?***"),
    ("('https://h/a?X-Goog-Signature=s3cr3t')", "('https://h/a?***')"),
    ("https://h/my file.json?v=1&token=s3cr3t", "https://h/my file.json?v=1&token=***"),
    ("token=s3cr3t", "token=***"),
    ("AWS_SECRET_ACCESS_KEY=s3cr3t refused", "AWS_SECRET_ACCESS_KEY=*** refused"),
    ("{'key': 's3cr3t', 'secret': \"s3cr3t\", 'anon': False}", "{'key': '***', 'secret': \"***\", 'anon': False}"),
    ("Authorization: Bearer s3cr3t.s3cr3t", "Authorization: Bearer ***"),
    ("simplecache::https://u:s3cr3t@h/x", "simplecache::https://***@h/x"),
    ("a https://u:s3cr3t@h/x and b https://v:s3cr3t@h/y", "a https://***@h/x and b https://***@h/y"),
]


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_secrets_are_hidden_and_the_rest_is_kept(text, expected):
    assert redacted(text) == expected
    assert redacted(redacted(text)) == expected
    assert str(InputError(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/data/cityscapes/aachen_0_1_pred.txt:3: expected '<png> <labelID> <score>', got 2 fields",
        "s3://bucket/dump/a@2x.png: no such file",
        "https://host:8080/path/a@2x.png: no such file",
        "w.pth: missing key 'backbone.bn1.bias' of hrnet18s_128",
        "run.json: this output was made with batch_size = 8, not 16; choose another output",
        "what? a question = no query",
        "file:///data/x_pred.txt",
    ],
)
def test_text_without_secrets_stays_as_it_is(text):
    assert redacted(text) == text


def test_an_error_is_one_printable_line_of_bounded_length_whatever_it_quotes():
    message = str(InputError("a\nb\r\x1b[31mred\udcff\u2028: expected " + "x" * 10**6))
    assert message.startswith("a\\nb\\r\\x1b[31mred\\udcff\\u2028: expected xxx")
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE


def test_an_error_travels_between_processes_unchanged():
    error = InputError("https://me:s3cr3t@host/a\n")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InputError
    assert str(again) == str(error) == "https://***@host/a\\n"

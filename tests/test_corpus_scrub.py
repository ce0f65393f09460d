"""Which secrets and addresses are replaced, which look-alikes stay, and that Python survives it."""

import ast
import string

import pytest

from megatron_ra3.corpus.scrub import EMAIL, scrub

LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef" * 4


def glue(*parts):
    """A secret in parts, so that no scanner takes this file for a leak."""
    return "".join(parts)


SECRETS = {
    "aws_key": glue("AKI", "AQWERTYUIOPASDFGH"),
    "azure_key": glue("Account", "Key=", LETTERS[:60], LETTERS[:26], "=="),
    "github_token": glue("gh", "p_", LETTERS[:36]),
    "gitlab_token": glue("glp", "at-", LETTERS[:20]),
    "google_key": glue("AI", "za", LETTERS[:35]),
    "huggingface_token": glue("h", "f_", string.ascii_letters[:34]),
    "json_web_token": glue("ey", "JhbGciOiJIUzI1NiJ9.", "eyJzdWIiOiIxIn0.", "c2lnbmF0dXJl"),
    "mailchimp_key": glue(HEX[:32], "-us", "12"),
    "npm_token": glue("//registry.npmjs.org/:_auth", "Token=npm_", LETTERS[:36]),
    "openai_key": glue("s", "k-", LETTERS[:20], "T3Blbk", "FJ", LETTERS[:20]),
    "anthropic_key": glue("s", "k-ant-", "api03-", LETTERS[:40]),
    "pypi_token": glue("pypi", "-AgEIcHlwaS5vcmc", LETTERS, LETTERS[:20]),
    "sendgrid_key": glue("S", "G.", LETTERS[:22], ".", LETTERS[:43]),
    "slack_token": glue("xo", "xb-", "123456789012-", "abcdefghij"),
    "square_secret": glue("sq0", "csp-", LETTERS[:43]),
    "stripe_key": glue("s", "k_live_", LETTERS),
    "telegram_token": glue("123456789", ":AA", LETTERS[:33]),
    "twilio_key": glue("A", "C", HEX[:32]),
    "url_password": glue("https://bob:", "hunter2", "@db.internal/x"),
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_replaced_whole_and_counted(kind):
    source = f'first = 1\nvalue = "{SECRETS[kind]}"  # keep\nlast = 2\n'
    scrubbed, counts = scrub(source)
    assert counts == {kind: 1}
    assert scrubbed.count("\n") == source.count("\n")
    [_, assign, _] = ast.parse(scrubbed).body
    value = ast.literal_eval(assign.value)
    expected = {
        "npm_token": "//registry.npmjs.org/:_authToken=NPM_TOKEN",
        "json_web_token": "JSON_WEB_TOKEN",
        "url_password": "https://bob:password@db.internal/x",
    }
    assert value == expected.get(kind, kind.upper())
    assert scrubbed.endswith('"  # keep\nlast = 2\n')
    assert scrub(scrubbed) == (scrubbed, {})


def test_a_secret_access_key_is_known_by_its_name():
    key = glue("wJalrXUtnFEMI", "K7MDENG", "bPxRfiCYEXAMPLEKEY00")
    scrubbed, counts = scrub(f"aws_secret_key = '{key}'\nsha = '{key}'\n")
    assert scrubbed == f"aws_secret_key = 'AWS_KEY'\nsha = '{key}'\n"
    assert counts == {"aws_key": 1}


def test_an_escape_before_a_secret_is_no_part_of_it():
    assert scrub(rf"x = 'a\n{SECRETS['aws_key']}'") == (r"x = 'a\nAWS_KEY'", {"aws_key": 1})


def test_of_a_private_key_only_the_base64_text_goes():
    begin, end = glue("-----BEGIN RSA ", "PRIVATE KEY-----"), glue("-----END RSA ", "PRIVATE KEY-----")
    rows = [LETTERS, LETTERS[::-1], "c2hvcnQgcm93IGF0IGVuZA=="]
    source = "KEY = '''" + "\n".join([begin, *rows, end]) + "'''\n"
    scrubbed, counts = scrub(source)
    assert scrubbed == "KEY = '''" + "\n".join([begin, *["PRIVATE_KEY"] * 3, end]) + "'''\n"
    assert counts == {"private_key": 1}
    escaped = source.replace("\n", "\\n")
    assert scrub(escaped)[0] == scrubbed.replace("\n", "\\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Jane Doe <jane.doe@corp.co.uk>, 2020", f"# Jane Doe <{EMAIL}>, 2020"),
        ("x = 'a@gmail.com; b+c@mail.tamu.edu'", f"x = '{EMAIL}; {EMAIL}'"),
        (r"x = 'a\njoe@corp.com'", rf"x = 'a\n{EMAIL}'"),
        (r"x = 'pers\udcfan@corp.com'", rf"x = 'pers\udcfa{EMAIL}'"),
        ("# mailto:joe@corp.com.", f"# mailto:{EMAIL}."),
    ],
)
def test_addresses_are_replaced(before, after):
    scrubbed, counts = scrub(before)
    assert scrubbed == after
    assert counts == {"email": before.count("@")}


@pytest.mark.parametrize(
    "source",
    [
        "y = a@b.mean\nz = x@w.T\nv = x@self.weight @ c",
        "y = a@b.at[0]\nz = a@b.to(c)",
        r"pattern = r'\d@corp.com|\w+@corp.com'",
        "dna = 'AAAACCATCTCTACCGGTTCGCTTTCACTGG'",
        "@app.route\ndef f(): pass",
        "# user@example.com, x@mail.example.org",
        "url = 'git@github.com:me/repo'\nu = 'ssh://me@github.com/x'\np = 'http://user:password@host.com/'",
        "dsn = f'postgres://{user}:{password}@{host}.com'",
        "dsn = 'postgres://%s:%s@host.com'",
        "if '-----BEGIN RSA PRIVATE KEY-----' in text: load()",
        "sha256 = '" + HEX + "'\nuuid = '123e4567-e89b-12d3-a456-426614174000'",
    ],
)
def test_look_alikes_stay(source):
    assert scrub(source) == (source, {})

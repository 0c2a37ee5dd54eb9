# Capture where a test needs a server of its own: branches refused, other
# encodings, and attached tables that come back from a dump.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('capture');
$node->init(extra => [ '--locale=C', '--encoding=UTF8' ]);
$node->append_conf('postgresql.conf', "max_prepared_transactions = 5\nshared_preload_libraries = 'softmobile'");
$node->start;

# What a command's failure tells; or nothing.
sub failure
{
	my ($db, $sql) = @_;
	my ($stderr);
	$node->psql($db, "\\set VERBOSITY verbose\n$sql", stderr => \$stderr, on_error_stop => 1);
	return $stderr;
}

# Unknown branches refused ------------------------------------------------------

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION softmobile;
SELECT softmobile.register_branch('S1', 'Centro');
CREATE TABLE sale (id integer PRIMARY KEY, branch text);
SELECT softmobile.attach('sale', 'sale', branch_column => 'branch');
ALTER DATABASE postgres SET softmobile.reason = 'capture test';
SQL
$node->append_conf('postgresql.conf', "softmobile.unknown_branch = refuse");
$node->reload;
ok($node->poll_query_until('postgres', "SELECT current_setting('softmobile.unknown_branch') = 'refuse'"), 'unknown branches are refused from now on');

my $refused = failure('postgres', "INSERT INTO sale VALUES (1, 'it''s new')");
like($refused, qr/ERROR:  23503: branch "it's new" is not registered/, 'refused: message and SQLSTATE');
like($refused, qr/HINT:  Register it: SELECT softmobile\.register_branch\('it''s new', 'its name'\)\./, 'refused: the hint can be run as it is');
is($node->safe_psql('postgres', 'SELECT count(*) FROM sale'), '0', 'refused: no row');
is(failure('postgres', "INSERT INTO sale VALUES (1, 'S1')"), '', 'a registered branch sells on');
like(failure('postgres', "UPDATE sale SET branch = 'S3'"), qr/23503/, 'nor can a row move to an unknown branch');
is(failure('postgres', "DELETE FROM sale"), '', 'deleted where it was');
$node->safe_psql('postgres', "SELECT softmobile.register_branch('it''s new', 'Nuevo')");
is(failure('postgres', "INSERT INTO sale VALUES (1, 'it''s new')"), '', 'and once it is registered, it sells');
# A row without a branch belongs to the database; that is a branch as any other.
like(failure('postgres', "INSERT INTO sale VALUES (2, NULL)"), qr/23503: branch "postgres" is not registered/, 'the default is refused alike');
$node->append_conf('postgresql.conf', "softmobile.unknown_branch = register");
$node->reload;

# Attached tables in a dump ------------------------------------------------------

$node->safe_psql('postgres', 'CREATE DATABASE shop');
$node->safe_psql('shop', <<'SQL');
CREATE EXTENSION softmobile;
SET softmobile.reason = 'capture test';
SET softmobile.branch_id = 'S1';
SELECT softmobile.register_branch('S1', 'Centro');
CREATE TABLE sale (gone_1 integer, gone_2 integer, id integer PRIMARY KEY, total numeric, note text);
ALTER TABLE sale DROP COLUMN gone_1, DROP COLUMN gone_2;
CREATE TABLE line (sale integer REFERENCES sale ON DELETE CASCADE, n integer, PRIMARY KEY (sale, n));
CREATE TABLE move (id integer, day integer, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE move_1 PARTITION OF move FOR VALUES FROM (0) TO (10);
CREATE TABLE move_2 PARTITION OF move FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id);
CREATE TABLE move_2a PARTITION OF move_2 DEFAULT;
CREATE TABLE party (id integer PRIMARY KEY);
CREATE TABLE person (name text, PRIMARY KEY (id)) INHERITS (party);
SELECT softmobile.attach('sale', 'sale', amount_column => 'total'), softmobile.attach('line', 'sale_line'), softmobile.attach('move', 'inventory_movement'),
	softmobile.attach('party', 'party');
ALTER TABLE line ADD CONSTRAINT n_positive CHECK (n > 0);
INSERT INTO sale VALUES (1, 10);
INSERT INTO line VALUES (1, 1);
INSERT INTO move VALUES (1, 1), (2, 11);
INSERT INTO person VALUES (1, 'x');
SQL

my $events = $node->safe_psql('shop', 'SELECT count(*) FROM softmobile.outbox_event');
my $triggers = q{SELECT string_agg(tgrelid::regclass || ' ' || tgname, ', ' ORDER BY tgrelid::regclass::text, tgname) FROM pg_trigger WHERE tgname LIKE '!softmobile%'};
my $triggers_before = $node->safe_psql('shop', $triggers);
my $dir = PostgreSQL::Test::Utils::tempdir;

$node->command_ok([ 'pg_dump', '-f', "$dir/plain.sql", '-d', $node->connstr('shop') ], 'pg_dump, plain');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dir/custom", '-d', $node->connstr('shop') ], 'pg_dump, custom');
$node->command_ok([ 'pg_dump', '--inserts', '--clean', '--if-exists', '-f', "$dir/inserts.sql", '-d', $node->connstr('shop') ], 'pg_dump, inserts');

# An epoch's number tells the second it was opened in; a restore within that second would meet the number again.
ok( $node->poll_query_until('shop',
		"SELECT max(epoch_no) < 2 * floor(extract(epoch FROM clock_timestamp() - timestamptz '2020-01-01 00:00:00+00')) FROM softmobile.outbox_epoch"),
	'a second goes by');

my %restore = (
	plain   => [ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/plain.sql" ],
	inserts => [ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/inserts.sql" ],
	custom  => [ 'pg_restore', '--exit-on-error', "$dir/custom" ],
	single  => [ 'pg_restore', '--single-transaction', "$dir/custom" ]);

foreach my $way (sort keys %restore)
{
	$node->safe_psql('postgres', "CREATE DATABASE $way");
	$node->command_ok([ $restore{$way}[0], '-d', $node->connstr($way), @{ $restore{$way} }[ 1 .. $#{ $restore{$way} } ] ], "$way: restored without an error");
	is($node->safe_psql($way, $triggers), $triggers_before, "$way: every trigger, once");
	is($node->safe_psql($way, 'SELECT count(*) FROM softmobile.outbox_event'), $events, "$way: every event, and none for the rows restored");
	$node->safe_psql($way, <<'SQL');
SET softmobile.reason = 'capture test';
SET softmobile.branch_id = 'S1';
INSERT INTO sale VALUES (2, 20);
INSERT INTO line VALUES (2, 1);
INSERT INTO move VALUES (3, 1), (4, 11);
INSERT INTO person VALUES (2, 'y');
DELETE FROM sale WHERE id = 1;
SQL
	is($node->safe_psql($way, 'SELECT count(*) FROM softmobile.outbox_event') - $events, 7, "$way: captured as before");

	# The dropped columns are no more, so the others have other numbers.
	$node->safe_psql($way, <<'SQL');
SET softmobile.reason = 'capture test';
SET softmobile.branch_id = 'S1';
ALTER TABLE sale RENAME id TO sale_id;
INSERT INTO sale VALUES (77, 70);
CREATE TABLE move_3 PARTITION OF move FOR VALUES FROM (20) TO (30);
INSERT INTO move VALUES (5, 21);
SQL
	is($node->safe_psql($way, "SELECT key_columns FROM softmobile.captured_table WHERE relation = 'sale'::regclass"), '{sale_id}', "$way: a renamed key is found");
	is($node->safe_psql($way, "SELECT entity_id, amount FROM softmobile.outbox_event WHERE payload::text LIKE '%77%'"), '77|70', "$way: and used");
	like(failure($way, 'TRUNCATE move_3'), qr/0A000/, "$way: a new partition is covered");
	like(failure($way, 'ALTER TABLE sale DROP COLUMN total'), qr/2BP01: cannot drop column "total" of public\.sale: softmobile captures by it/, "$way: what capture needs stays");
}

# Rows of a schema-only dump's database are refused until somebody says how they are captured.
$node->safe_psql('postgres', 'CREATE DATABASE schema_only');
$node->command_ok([ 'pg_restore', '--exit-on-error', '--schema-only', '-d', $node->connstr('schema_only'), "$dir/custom" ], 'schema only: restored without an error');
like(failure('schema_only', 'INSERT INTO sale VALUES (1, 1)'), qr/55000: table "sale" is not attached to softmobile/, 'schema only: not attached');
is(failure('schema_only', "SELECT softmobile.attach('sale', 'sale')"), '', 'schema only: attached');
is(failure('schema_only', "SET softmobile.reason = 'capture test'; INSERT INTO sale VALUES (1, 1)"), '', 'schema only: captured');

# Other encodings ------------------------------------------------------------------

foreach my $encoding ('LATIN1', 'SQL_ASCII', 'EUC_JP')
{
	my $db = lc $encoding;
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE template0 ENCODING '$encoding' LOCALE 'C'");
	$node->safe_psql($db, <<'SQL');
CREATE EXTENSION softmobile;
CREATE TABLE sale (id integer PRIMARY KEY, note text);
SELECT softmobile.attach('sale', 'sale');
SQL
	my $text = $encoding eq 'EUC_JP' ? "convert_from('\\xa4a2a4a4a4a6a4a8a4aa', 'EUC_JP')" : "convert_from('\\xf1e1e9edf3', '$encoding')";
	$text = "'\\xf1e1e9edf3'::bytea::text" if $encoding eq 'SQL_ASCII';
	like(failure($db, "SELECT softmobile.set_reason($text); INSERT INTO sale VALUES (0, 'x')"), qr/23514/, "$encoding: a reason ends with its transaction");
	is(failure($db, "BEGIN; SELECT softmobile.set_reason($text); INSERT INTO sale VALUES (1, $text); COMMIT"), '', "$encoding: a reason of five characters");
	like(failure($db, "SELECT softmobile.set_reason(substr($text, 1, 4))"), qr/23514/, "$encoding: four are too few");
	is($node->safe_psql($db, "SELECT (payload -> 'new')::text = row_to_json(s)::text FROM softmobile.outbox_event e, sale s"), 't', "$encoding: payload as row_to_json() has it");
}

$node->stop;
done_testing();

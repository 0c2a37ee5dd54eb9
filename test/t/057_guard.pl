# Undelivered events are not lost by mistake: the extension is not dropped, in
# whatever way, and a branch is not deactivated while there are any, unless
# somebody who may says so. What is detached or dropped otherwise stays deliverable.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $FORCE = 'SET LOCAL softmobile.drop_undelivered = on;';

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'\nmax_prepared_transactions = 2\n");
$node->start;

# Owners of the extension, and of its schema, who are not superusers when it matters.
$node->safe_psql('postgres', 'CREATE ROLE boss SUPERUSER LOGIN; CREATE ROLE clerk; CREATE ROLE manager; CREATE DATABASE shop; GRANT CREATE ON DATABASE shop TO boss');
$node->safe_psql('shop', q{
	SET ROLE boss;
	CREATE EXTENSION softmobile;
	RESET ROLE;
	CREATE EXTENSION pg_trgm;
	SELECT softmobile.register_branch('1', 'Centro'), softmobile.register_branch('2', 'Norte');
	SELECT softmobile.grant_role('manager', 'operator');
	CREATE TABLE sale (id integer PRIMARY KEY, branch text, total numeric);
	SELECT softmobile.attach('sale', 'sale', branch_column => 'branch', amount_column => 'total', require_reason => false);
	CREATE TABLE visit (id integer PRIMARY KEY, branch text);
	SELECT softmobile.attach('visit', 'visit', branch_column => 'branch', require_reason => false);
	ALTER ROLE boss NOSUPERUSER});

# A command fails, with an SQLSTATE and a message that fit the pattern, and says what to do.
sub refused
{
	my ($command, $pattern, $name, %options) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($ret, $stdout, $stderr) = $options{node} // $node;

	($ret, $stdout, $stderr) = $ret->psql($options{db} // 'shop', "\\set VERBOSITY verbose\n$command");
	isnt($ret, 0, $name);
	like($stderr, $pattern, '... as it should');
	return $stderr;
}

# A command works; what it did is undone.
sub allowed
{
	my ($command, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($ret, $stdout, $stderr) = $node->psql('shop', "BEGIN; $command; ROLLBACK");

	is($ret, 0, $name) or diag($stderr);
	return;
}

my %way = (
	'DROP EXTENSION'                 => 'DROP EXTENSION softmobile CASCADE',
	'DROP SCHEMA'                    => 'DROP SCHEMA softmobile CASCADE',
	'DROP OWNED'                     => 'DROP OWNED BY boss CASCADE',
	'DROP EXTENSION plpgsql'         => 'DROP EXTENSION plpgsql CASCADE',
	'DROP EXTENSION of several'      => 'DROP EXTENSION pg_trgm, softmobile CASCADE',
	'DROP EXTENSION in a DO block'   => 'DO $$BEGIN DROP EXTENSION softmobile CASCADE; END$$',
	'DROP EXTENSION in a savepoint'  => 'SAVEPOINT s; DROP EXTENSION softmobile CASCADE; RELEASE s',
	'DROP EXTENSION in replica mode' => 'SET LOCAL session_replication_role = replica; DROP EXTENSION softmobile CASCADE',
	'DROP EXTENSION, serializable'   => 'SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; DROP EXTENSION softmobile CASCADE');

# ---------------------------------------------------------------------------
# Nothing waits

allowed($way{$_}, "nothing waits: $_") foreach sort keys %way;
allowed('ALTER EXTENSION softmobile DROP TABLE softmobile.outbox_event_1', 'nothing waits: ALTER EXTENSION DROP TABLE');
allowed("SELECT softmobile.register_branch('1', 'Centro', active => false)", 'nothing waits: deactivating a branch');
allowed('SET ROLE boss; DROP EXTENSION softmobile CASCADE', 'nothing waits: an owner who is no superuser');
is($node->safe_psql('shop', 'SELECT * FROM softmobile.undelivered()'), '0|0|t|', 'undelivered(): none');

# ---------------------------------------------------------------------------
# Something waits

$node->safe_psql('shop', q{INSERT INTO sale VALUES (1, '1', 100.25), (2, '1', 250.25); INSERT INTO visit VALUES (1, '1')});
my $three = qr/ERROR:  55006: cannot drop extension "softmobile" while 3 events are undelivered \(amount: 350\.50\)/;

foreach my $way (sort keys %way)
{
	my $stderr = refused("BEGIN; $way{$way}; COMMIT", $three, $way);

	like($stderr, qr/HINT:  Send them first: call softmobile\.sync_run\(\)\. To lose them: SET softmobile\.drop_undelivered = on/, '... and says what to do');
	allowed("$FORCE $way{$way}", "$way, forced");
}
is($node->safe_psql('shop', 'SELECT events, amount, complete, words FROM softmobile.undelivered()'),
	'3|350.50|t|3 events are undelivered (amount: 350.50)', 'undelivered(): all is still there');
is($node->safe_psql('shop', q{SELECT events, complete FROM softmobile.undelivered('1', 2)}), '2|f', '... looks no further than it is told');
is($node->safe_psql('shop', q{SELECT events FROM softmobile.undelivered('2')}), '0', '... of another branch');

# Who may not drop it learns nothing; an owner who is no superuser cannot force it, unless he was given the right.

refused('SET ROLE clerk; DROP EXTENSION softmobile CASCADE', qr/42501: must be owner of extension softmobile/, 'somebody else');
refused('SET ROLE clerk; ALTER EXTENSION softmobile DROP TABLE softmobile.outbox_lane', qr/42501: must be owner of extension softmobile/, 'somebody else, ALTER EXTENSION');
refused("SET ROLE boss; $_", $three, "the owner: $_") foreach ('DROP EXTENSION softmobile CASCADE', 'DROP SCHEMA softmobile CASCADE', 'DROP OWNED BY boss CASCADE');
refused('SET ROLE boss; SET softmobile.drop_undelivered = on', qr/42501: permission denied to set parameter "softmobile\.drop_undelivered"/, 'the owner cannot force it');
$node->safe_psql('shop', 'GRANT SET ON PARAMETER softmobile.drop_undelivered TO boss');
allowed("SET ROLE boss; $FORCE DROP EXTENSION softmobile CASCADE", 'the owner who was given the right forces it');
refused('ALTER SCHEMA softmobile OWNER TO clerk; SET ROLE clerk; BEGIN; DROP SCHEMA softmobile CASCADE; COMMIT', $three,
	'the owner of the schema, without any right in it');
$node->safe_psql('shop', 'ALTER SCHEMA softmobile OWNER TO boss');
refused(q{ALTER SYSTEM SET softmobile.drop_undelivered = on}, qr/cannot be changed/, 'it is not forced for good');

# A search_path of the caller's does not find its way into the look.

refused(q{CREATE SCHEMA trap;
	CREATE FUNCTION trap.undelivered(text DEFAULT '', integer DEFAULT 0, OUT words text) LANGUAGE sql AS $$SELECT NULL::text$$;
	SET search_path = trap, pg_catalog; DROP EXTENSION softmobile CASCADE}, $three, 'objects planted in the search_path');

# Transactions

refused(q{BEGIN; INSERT INTO sale VALUES (3, '2', 1); DROP EXTENSION softmobile CASCADE; COMMIT},
	qr/while 4 events are undelivered \(amount: 351\.50\)/, 'the transaction\'s own sale counts');
refused(qq{BEGIN; SAVEPOINT s; $FORCE DROP EXTENSION softmobile CASCADE; ROLLBACK TO s; DROP EXTENSION softmobile CASCADE; COMMIT},
	$three, 'what was rolled back is looked at again');

my $seller = $node->background_psql('shop');
$seller->query_safe(q{BEGIN; INSERT INTO sale VALUES (4, '1', 0.50)});
my $dropper = $node->background_psql('shop', on_error_stop => 0);
$dropper->query_until(qr/begun/, "BEGIN ISOLATION LEVEL REPEATABLE READ;\nSELECT count(*) FROM sale;\n\\echo begun\nDROP EXTENSION softmobile CASCADE;\n\\echo done\n");
$node->poll_query_until('shop', q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'DROP EXTENSION%'})
  or die 'DROP EXTENSION does not wait for the sale';
$seller->query_safe('COMMIT');
$dropper->query_until(qr/done/, "\n");
like($dropper->{stderr}, qr/while 4 events are undelivered \(amount: 351\.00\)/, 'a sale committed while DROP EXTENSION waited for it counts, whatever the isolation');
$_->quit foreach ($seller, $dropper);

$node->safe_psql('shop', q{BEGIN; INSERT INTO sale VALUES (5, '1', 1); ROLLBACK});
refused('DROP EXTENSION softmobile CASCADE', qr/while 4 events are undelivered/, 'a sale rolled back does not');
$node->safe_psql('shop', q{BEGIN; INSERT INTO sale VALUES (6, '1', 1); PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'});
refused('DROP EXTENSION softmobile CASCADE', qr/while 5 events are undelivered \(amount: 352\.00\)/, 'one prepared and committed does');

# Tables of the extension

refused('DROP TABLE softmobile.outbox_event_1 CASCADE', qr/2BP01: cannot drop table softmobile\.outbox_event_1 because extension softmobile requires it/,
	'DROP TABLE of the log');
refused('ALTER EXTENSION softmobile DROP TABLE softmobile.outbox_event_1',
	qr/55006: cannot take a table out of extension "softmobile" while 5 events are undelivered \(amount: 352\.00\)/, 'ALTER EXTENSION DROP TABLE');
allowed("$FORCE ALTER EXTENSION softmobile DROP TABLE softmobile.outbox_event_1", 'ALTER EXTENSION DROP TABLE, forced');

# What has nothing to do with it

allowed($_, $_) foreach (
	'DROP EXTENSION pg_trgm',
	'DROP OWNED BY clerk CASCADE',
	'CREATE SCHEMA other CREATE TABLE t (i integer PRIMARY KEY); DROP SCHEMA other CASCADE',
	'CREATE TEMP TABLE t (i integer PRIMARY KEY, x text); DROP TABLE t',
	'ALTER EXTENSION softmobile UPDATE',
	'DROP TABLE sale',
	'CREATE INDEX ours ON softmobile.outbox_event_1 (created_at); DROP INDEX softmobile.ours',
	'ALTER EXTENSION softmobile ADD TABLE visit; DROP EXTENSION pg_trgm',
	'ALTER EXTENSION pg_trgm DROP FUNCTION public.show_limit()');

# ---------------------------------------------------------------------------
# Branches

my $deactivate = q{softmobile.register_branch('1', 'Centro', active => false)};
my $stderr = refused("SELECT $deactivate", qr/55006: cannot deactivate branch "1" while 5 events are undelivered \(amount: 352\.00\)/, 'deactivating a branch');
like($stderr, qr/HINT:  Send them first: call softmobile\.sync_run\('1'\)\./, '... says what to do');
refused("SET ROLE manager; SELECT $deactivate", qr/55006: cannot deactivate branch "1"/, 'deactivating a branch, as an operator');
refused(q{UPDATE softmobile.branch SET active = false}, qr/55006: cannot deactivate branch "1"/, 'deactivating branches past the function');
is($node->safe_psql('shop', q{SELECT active, name FROM softmobile.branch ORDER BY branch_id}), "t|Centro\nt|Norte", '... changes nothing');
allowed(q{SET ROLE manager; SELECT softmobile.register_branch('2', 'Norte', active => false)}, 'a branch of which nothing waits');
allowed(q{SELECT softmobile.register_branch('1', 'Centro histórico', 'https://central.example')}, 'a branch that stays active');
$node->safe_psql('shop', "BEGIN; $FORCE SELECT $deactivate; COMMIT");
is($node->safe_psql('shop', q{SELECT active FROM softmobile.branch WHERE branch_id = '1'}), 'f', 'deactivating a branch, forced');
allowed("SELECT $deactivate", 'a branch that is inactive already');
refused('DROP EXTENSION softmobile CASCADE', qr/while 5 events are undelivered/, 'an inactive branch\'s events are no less undelivered');
$node->safe_psql('shop', q{SELECT softmobile.register_branch('1', 'Centro')});
is($node->safe_psql('shop', q{SELECT active FROM softmobile.branch WHERE branch_id = '1'}), 't', 'reactivating it');

# A branch met for the first time.
$node->safe_psql('shop', q{INSERT INTO sale VALUES (7, 'new', 10)});
refused('DROP EXTENSION softmobile CASCADE', qr/while 6 events are undelivered \(amount: 362\.00\)/, 'a sale of an unknown branch');
$node->poll_query_until('shop', q{SELECT count(*) = 1 FROM softmobile.branch WHERE branch_id = 'new'}) or die 'the branch is not registered';
refused(q{SELECT softmobile.register_branch('new', 'Nueva', active => false)}, qr/55006: cannot deactivate branch "new" while 1 event is undelivered \(amount: 10\)/,
	'... counts once the branch is registered, once');
is($node->safe_psql('shop', q{SELECT events FROM softmobile.undelivered()}), '6', '... and once in all');

# ---------------------------------------------------------------------------
# Restores

my $dir = PostgreSQL::Test::Utils::tempdir();
my @restore = ('pg_restore', '--clean', '--if-exists', '--single-transaction', '-d', $node->connstr('shop'), "$dir/shop.dump");
$node->safe_psql('postgres', 'CREATE DATABASE other TEMPLATE template0');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dir/shop.dump", '-d', $node->connstr('shop') ], 'pg_dump');
$node->command_ok([ 'pg_restore', '--exit-on-error', '-d', $node->connstr('other'), "$dir/shop.dump" ], 'pg_restore');
is($node->safe_psql('other', 'SELECT events, amount FROM softmobile.undelivered()'), '6|362.00', '... brings what is undelivered');
$node->safe_psql('other', 'BEGIN; SET LOCAL softmobile.drop_undelivered = on; DROP EXTENSION softmobile CASCADE; CREATE EXTENSION softmobile; COMMIT');
$restore[5] = $node->connstr('other');
$node->command_ok(\@restore, 'pg_restore --clean over a database where nothing waits');
is($node->safe_psql('other', 'SELECT events, amount FROM softmobile.undelivered()'), '6|362.00', '... brings the same');
$node->command_fails_like(\@restore, qr/cannot drop extension "softmobile" while 6 events are undelivered/, 'pg_restore --clean over events that wait');
{
	local $ENV{PGOPTIONS} = '-c softmobile.drop_undelivered=on';
	$node->command_ok(\@restore, '... forced');
}
is($node->safe_psql('other', 'SELECT events, amount FROM softmobile.undelivered()'), '6|362.00', '... brings the same');
$node->safe_psql('postgres', 'DROP DATABASE other');
pass('DROP DATABASE is not refused');

# ---------------------------------------------------------------------------
# More than one wants to count

$node->safe_psql('shop', q{INSERT INTO sale SELECT i, '2', 1 FROM generate_series(1001, 101001) i});
refused('DROP EXTENSION softmobile CASCADE', qr/while at least 100000 events are undelivered \(amount of these: \d+\.\d+\)/, 'a long queue is not counted to its end');
refused(q{SELECT softmobile.register_branch('2', 'Norte', active => false)},
	qr/cannot deactivate branch "2" while at least 100000 events are undelivered \(amount of these: 100000\)/, '... nor that of a branch');

# For good.
$node->safe_psql('shop', 'SET softmobile.drop_undelivered = on; DROP EXTENSION softmobile CASCADE');
is($node->safe_psql('shop', q{SELECT count(*) FROM pg_extension WHERE extname = 'softmobile'}), '0', 'forced: it is gone');
$node->safe_psql('shop', 'BEGIN; CREATE EXTENSION softmobile; DROP EXTENSION softmobile; CREATE EXTENSION softmobile; COMMIT');
pass('a new one comes and goes');
$node->stop;

# ---------------------------------------------------------------------------
# Events that central has taken, or refused; tables detached and dropped

my $central = SmReceiver->new;
my $shop = SmShop->new(url => $central->url, conf => "softmobile.retry_interval = 600s\nsoftmobile.probe_interval = 1s\n");

$central->answer('reject', subjects => { 'S-2' => 'no such article' });
$shop->sell(1, 'S-1', 'S-2', 'S-3');
$shop->change(q{UPDATE sale SET note = 'later' WHERE id = 'S-2'});
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE state = 'failed'}, 2, 'one rejected, and one waits behind it');
refused('DROP EXTENSION softmobile CASCADE', qr/while 2 events are undelivered \(amount: 0\)/, 'rejected events are undelivered', node => $shop->node, db => 'postgres');
refused(q{SELECT softmobile.register_branch('1', 'Centro', active => false)}, qr/cannot deactivate branch "1" while 2 events are undelivered/,
	'... for the branch too', node => $shop->node, db => 'postgres');

$central->refuse;
$shop->change(q{INSERT INTO customer VALUES ('C-1', '1')}, q{INSERT INTO draft VALUES ('D-1', '1')});
$shop->fails_with(qr/offline/, 'the link is down');
refused('DROP EXTENSION softmobile CASCADE', qr/while 4 events are undelivered/, 'so are those of a failed batch', node => $shop->node, db => 'postgres');
$shop->sql(q{SELECT softmobile.detach('customer'); DROP TABLE draft});
is($shop->sql('SELECT events FROM softmobile.undelivered()'), '4', 'detached and dropped tables\' events stay');
$central->answer('receipt');
$central->listen;
$shop->comes_to(q{SELECT events FROM softmobile.undelivered()}, 2, '... and are delivered');
is(join(' ', sort map { $_->{subject} } $central->events), 'C-1 D-1 S-1 S-3', '... by name');
$shop->sql(q{SELECT count(*) FROM softmobile.sync_outbox_retry(ARRAY(SELECT id FROM softmobile.outbox_exception WHERE state = 'failed'), 'article is known now')});
$shop->comes_to('SELECT events FROM softmobile.undelivered()', 0, 'all is delivered');
$shop->sql(q{SELECT softmobile.register_branch('1', 'Centro', active => false)});
pass('the branch is deactivated');
$shop->sql('DROP EXTENSION softmobile CASCADE');
pass('the extension is dropped');
$shop->stop;

# ---------------------------------------------------------------------------
# Without preload

my $plain = PostgreSQL::Test::Cluster->new('plain');
$plain->init;
$plain->start;
$plain->safe_psql('postgres', q{
	CREATE EXTENSION softmobile;
	CREATE TABLE sale (id integer PRIMARY KEY, total numeric);
	SELECT softmobile.register_branch('1', 'Centro');
	SELECT softmobile.attach('sale', 'sale', amount_column => 'total', require_reason => false);
	ALTER DATABASE postgres SET softmobile.branch_id = '1'});
$plain->safe_psql('postgres', 'INSERT INTO sale VALUES (1, 9.99)');
foreach my $command ('DROP EXTENSION softmobile CASCADE', 'DROP SCHEMA softmobile CASCADE', 'DROP EXTENSION plpgsql CASCADE')
{
	refused($command, qr/55006: cannot drop extension "softmobile" while 1 event is undelivered \(amount: 9\.99\)/, "without preload: $command",
		node => $plain, db => 'postgres');
}
refused(q{SELECT softmobile.register_branch('1', 'Centro', active => false)}, qr/55006: cannot deactivate branch "1" while 1 event is undelivered/,
	'without preload: deactivating a branch', node => $plain, db => 'postgres');
refused(q{UPDATE softmobile.branch SET active = false}, qr/55006: cannot deactivate branch "1"/, 'without preload: past the function',
	node => $plain, db => 'postgres');
$plain->safe_psql('postgres', 'CREATE ROLE visitor; CREATE SCHEMA theirs AUTHORIZATION visitor; SET ROLE visitor; DROP SCHEMA theirs');
pass('without preload: a visitor drops a schema');
$plain->safe_psql('postgres', 'BEGIN; SET softmobile.drop_undelivered = on; DROP EXTENSION softmobile CASCADE; ROLLBACK');
pass('without preload: forced');
$plain->safe_psql('postgres', 'ALTER EVENT TRIGGER softmobile_guard_drop DISABLE; DROP EXTENSION softmobile CASCADE');
pass('without preload: not refused where the event trigger is disabled');
$plain->stop;

done_testing();

# Invariant 7 with our own central: a database set back, promoted, cloned or
# upgraded never makes central take a new event for an old one, and never hides a
# lost one.  (Lagging standbys, copies by template and dumps: 045_epoch.pl; a
# snapshot of the storage: 059_verify.pl.)  pg_upgrade starts from this version and
# from each that SM_OLD_PG_CONFIG names, for which the library must be installed.

use strict;
use warnings;

use File::Basename qw(dirname);
use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $token_file = "$PostgreSQL::Test::Utils::tmp_check/token";

append_to_file($token_file, token('b1'));
chmod 0600, $token_file or die "chmod: $!";

my $shop = SmShop->new(
	name     => 'primary',
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['b1'],
	init     => { allows_streaming => 1, has_archiving => 1 },
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.auth_token_file = '$token_file'\n");
my $primary = $shop->node;

sub sell
{
	my ($node, @ids) = @_;
	$node->safe_psql('postgres', "BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale (id, branch) VALUES "
		  . join(', ', map { "('$_', 'b1')" } @ids) . '; COMMIT');
	return;
}

sub drained
{
	my ($node, $name) = @_;
	return ok($node->poll_query_until('postgres', "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'", '0'), $name);
}

# How many sales headquarters has whose ids match.
sub at_central
{
	my ($pattern, $expected, $name) = @_;
	return is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_projection WHERE entity_type = 'sale' AND entity_id ~ '$pattern'"), $expected, $name);
}

sub forks
{
	return $central->safe_psql('postgres', 'SELECT count(*) FROM softmobile.central_fork');
}

sub version
{
	my ($node) = @_;
	return $node->config_data('--version') =~ /([\d.]+\w*)/ ? $1 : die 'no version';
}

# A stopped server's cluster brought to the version that is tested: pg_upgrade.
sub upgrade
{
	my ($old, $name, %init) = @_;
	my $new = PostgreSQL::Test::Cluster->new($name);
	my $what = 'pg_upgrade of ' . $old->name . ' from ' . version($old) . ' to ' . version($new);

	diag("tested: $what");
	$new->init(%init);
	$new->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'\n");
	chdir $new->basedir or die "chdir: $!";
	$new->command_ok([ 'pg_upgrade', '--no-sync', '-b', $old->config_data('--bindir'), '-B', $new->config_data('--bindir'), '-d', $old->data_dir, '-D', $new->data_dir,
		'-p', $old->port, '-P', $new->port, '-s', $new->host ], $what);
	chdir $FindBin::Bin;
	return $new;
}

# ---------------------------------------------------------------------------
# Set back by a recovery to a point in time, before events that central has

sell($primary, map { "A-$_" } 1 .. 10);
drained($primary, 'the shop sells');
$primary->backup('base');
sell($primary, map { "B-$_" } 1 .. 10);

# What waits at that moment, what is sent later, and what is sold later.
my $point = $primary->safe_psql('postgres', 'SELECT pg_current_wal_insert_lsn()');
$primary->safe_psql('postgres', "SELECT pg_create_restore_point('noon')");
drained($primary, 'what was sold before the point is sent');
sell($primary, map { "C-$_" } 1 .. 10);
drained($primary, 'and what was sold after it');
$primary->safe_psql('postgres', 'SELECT pg_switch_wal()');
$primary->stop;

my $recovered = PostgreSQL::Test::Cluster->new('recovered');
$recovered->init_from_backup($primary, 'base', has_restoring => 1);
$recovered->append_conf('postgresql.conf', "recovery_target_name = 'noon'\nrecovery_target_action = promote\n");
$recovered->start;
ok($recovered->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()'), 'PITR: recovered');
is($recovered->safe_psql('postgres', "SELECT count(*) FROM sale WHERE id LIKE 'C-%'"), '0', 'PITR: to before what central has');
ok($recovered->poll_query_until('postgres', "SELECT count(*) FROM softmobile.outbox_epoch WHERE registered AND why LIKE 'another timeline%'", '1'), 'PITR: a new epoch');
sell($recovered, map { "D-$_" } 1 .. 10);
drained($recovered, 'PITR: the shop sells on');
at_central('^D-', 10, 'invariant 7: PITR: no new event is taken for an old one');
at_central('^C-', 10, 'invariant 7: PITR: what only central has stays there');
is(forks(), 0, 'invariant 7: PITR: no number stands for two events');
is($recovered->safe_psql('postgres', "SELECT softmobile.count_numbers(range_agg(unknown_here)) FROM softmobile.verify_delivery('b1')"), 10, 'PITR: verify_delivery() names what is lost here');
is($recovered->safe_psql('postgres', "SELECT softmobile.count_numbers(range_agg(missing_at_central)) FROM softmobile.verify_delivery('b1')"), 0, 'PITR: nothing is lost there');

# ---------------------------------------------------------------------------
# A synchronous standby promoted: nothing is lost, nothing is sent twice in effect

$recovered->append_conf('postgresql.conf', "recovery_target_name = ''\n");
$recovered->restart;
$recovered->backup('sync');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($recovered, 'sync', has_streaming => 1);
$standby->start;
$recovered->append_conf('postgresql.conf', "synchronous_standby_names = 'standby'\n");
$recovered->reload;
ok($recovered->poll_query_until('postgres', "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", '1'), 'a synchronous standby');
stop_gateway($gateway);
sell($recovered, map { "E-$_" } 1 .. 20);
$recovered->stop('immediate');
$gateway = start_gateway();
$standby->append_conf('postgresql.conf', "softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'\n");
$standby->reload;
$standby->promote;
sell($standby, map { "F-$_" } 1 .. 5);
drained($standby, 'synchronous standby: promoted, it sends what the primary had');
at_central('^E-', 20, 'synchronous standby: every sale that was confirmed');
at_central('^F-', 5, 'invariant 7: synchronous standby: and every new one');
is(forks(), 0, 'synchronous standby: no fork');
is($standby->safe_psql('postgres', "SELECT string_agg(DISTINCT missing_at_central::text, ' ') FROM softmobile.verify_delivery('b1')"), '{}', 'synchronous standby: nothing is lost');

# ---------------------------------------------------------------------------
# pg_upgrade, with events waiting

stop_gateway($gateway);
sell($standby, map { "G-$_" } 1 .. 7);
$standby->stop;

my $upgraded = upgrade($standby, 'upgraded');

$gateway = start_gateway();
$upgraded->append_conf('postgresql.conf', "softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'\nsoftmobile.auth_token_file = '$token_file'\nsoftmobile.probe_interval = 1s\n");
$upgraded->start;
is($upgraded->safe_psql('postgres', "SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id ~ '^G-'"), '7', 'pg_upgrade: the queue is there');
sell($upgraded, map { "H-$_" } 1 .. 7);
drained($upgraded, 'pg_upgrade: drains, and sells on');
at_central('^[GH]-', 14, 'invariant 7: pg_upgrade: all arrive');
is(forks(), 0, 'pg_upgrade: no fork');
is($upgraded->safe_psql('postgres', "SELECT bool_and(missing_at_central = '{}') FROM softmobile.verify_delivery('b1')"), 't', 'pg_upgrade: nothing is lost');

# ---------------------------------------------------------------------------
# Cloned: two servers that sell as the same branch, and know nothing of each other

stop_gateway($gateway);
$upgraded->stop;
$upgraded->backup_fs_cold('clone');
my $clone = PostgreSQL::Test::Cluster->new('clone');
$clone->init_from_backup($upgraded, 'clone');
$upgraded->start;
$clone->start;
sell($upgraded, map { "I-$_" } 1 .. 6);
sell($clone, map { "J-$_" } 1 .. 6);
$gateway = start_gateway();
foreach my $node ($upgraded, $clone)
{
	$node->safe_psql('postgres', "ALTER DATABASE postgres SET softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'");
	drained($node, $node->name . ': all is sent');
}
at_central('^[IJ]-', 12, 'invariant 7: clone: no sale is dropped as a duplicate');

# The clone is not behind central when it asks: both have used the same numbers, and nobody can notice before they have been sent.
is(forks(), 6, 'invariant 7: clone: central notices that a number stands for two events, six times');
is($_->safe_psql('postgres', "SELECT sum(forks) FROM softmobile.verify_delivery('b1')"), 6, 'clone: ' . $_->name . ' is told of each fork') foreach $upgraded, $clone;
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_inbox WHERE entity_id ~ '^[IJ]-'"), 12, 'invariant 7: clone: noticed, nothing dropped');

$_->stop foreach $upgraded, $clone;

# ---------------------------------------------------------------------------
# pg_upgrade of both sides from older versions of PostgreSQL, headquarters first: with delivered events, open conflicts, what
# waits behind them and for the link, and two epochs

# All rows of these, each with its order.
sub contents
{
	my ($node, @tables) = @_;
	return join("\n", map { $node->safe_psql('postgres', "SELECT * FROM softmobile.$_") } @tables);
}

# What an upgrade must not change, and what does not change by itself while central is away.
my @of_shop = (
	'outbox_event ORDER BY id',
	'outbox_exception ORDER BY id',
	'outbox_batch ORDER BY batch_id',
	q{sync_history WHERE status = 'success' ORDER BY id},
	'branch ORDER BY branch_id',
	'captured_table ORDER BY relation');
my @of_central = map { "$_ ORDER BY 1, 2, 3, 4, 5" } qw(central_inbox central_projection central_lane central_span central_conflict central_token);

sub statuses
{
	my ($shop) = @_;
	return $shop->sql("SELECT status = 'SENT', count(*), count(*) FILTER (WHERE conflict_flag) FROM softmobile.sync_outbox GROUP BY 1 ORDER BY 1");
}

sub upgrade_from
{
	my ($pg_config) = @_;
	chomp(my $bin = `"$pg_config" --bindir`);
	my ($major) = `"$pg_config" --version` =~ /PostgreSQL (\d+)/;
	my %install = (install_path => dirname($bin));
	my $hq = start_central(name => "central_$major", %install);
	my $token = "$PostgreSQL::Test::Utils::tmp_check/token.$major";

	append_to_file($token, token('b1'));
	chmod 0600, $token or die "chmod: $!";
	$gateway = start_gateway();
	my $conf = "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.auth_token_file = '$token'\n";
	my $old = SmShop->new(name => "shop_$major", %install, url => "http://127.0.0.1:$gateway->{port}", branches => ['b1'], conf => $conf);

	$old->sql(q{ALTER DATABASE postgres SET softmobile.branch_id = 'b1'});
	is($_->safe_psql('postgres', "SELECT current_setting('server_version_num')::integer / 10000"), $major, "from $major: " . $_->name) foreach $hq, $old->node;
	$old->sell_many('b1', 'A', 50);
	# Who looks at the log has its number drawn.
	$old->sql(q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale VALUES ('never', 'b1'); SELECT count(*) FROM softmobile.outbox_event; ROLLBACK});
	$old->sell('b1', 'A-51');
	$old->drains("from $major: the shop has sold");
	$old->comes_to(q{SELECT count(*) FROM softmobile.outbox_batch WHERE kind = 'void'}, 1, "from $major: a number is void");

	# Both sides change the same rows; one decision is still to come when the servers are upgraded, one has been made.
	foreach my $id ('A-1', 'A-2')
	{
		$hq->safe_psql('postgres', "SELECT softmobile.central_change('b1', 'sale', '$id',
			(SELECT row || '{\"note\": \"headquarters\"}' FROM softmobile.central_projection WHERE entity_id = '$id'), 'price list')");
		$old->change("UPDATE sale SET note = 'shop' WHERE id = '$id'");
	}
	$old->comes_to('SELECT count(DISTINCT id) FROM softmobile.sync_conflicts', 2, "from $major: conflicts");
	stop_gateway($gateway);
	$old->change(q{UPDATE sale SET note = 'shop again' WHERE id = 'A-1'});
	$old->sell_many('b1', 'B', 20);
	$old->sql(q{SELECT softmobile.open_epoch('before the upgrade')});
	$old->sell_many('b1', 'C', 10);
	$old->change(q{INSERT INTO customer VALUES ('c', 'b1')}, q{INSERT INTO draft VALUES ('d', 'b1')}, q{UPDATE sale SET note = 'shop' WHERE id = 'A-3'});
	$old->sql(q{SELECT softmobile.resolve_conflict(id, 'central', 'asked the manager') FROM softmobile.sync_conflicts WHERE entity_id = 'A-2'});
	$old->comes_to('SELECT count(*) FROM softmobile.outbox_request', 0, "from $major: the decision is taken up");
	$old->fails_with(qr/^offline/m, "from $major: what waits has been tried");

	my $at_hq = contents($hq, @of_central);
	$hq->stop;
	$hq = upgrade($hq, "central_$major\_upgraded", extra => [ '--encoding=UTF8', '--locale=C' ]);
	$hq->start;
	is(contents($hq, @of_central), $at_hq, "from $major: headquarters: all rows are there");

	my $epochs = $old->sql('SELECT count(*) FROM softmobile.outbox_epoch WHERE registered');
	is(statuses($old), "f|37|2\nt|51|0", "from $major: shop: what has been sent, and what waits");
	my $at_shop = contents($old->node, @of_shop);
	$old->stop;
	my $new = bless { node => upgrade($old->node, "shop_$major\_upgraded") }, 'SmShop';
	$new->node->append_conf('postgresql.conf', $conf);
	$new->node->start;
	is(contents($new->node, @of_shop), $at_shop, "from $major: shop: all events, exceptions, the ledger, sessions, branches and tables are there");
	is(statuses($new), "f|37|2\nt|51|0", "from $major: shop: what was sent is sent, what waited waits");
	is($new->sql('SHOW softmobile.branch_id'), 'b1', "from $major: shop: settings of the database");
	$new->comes_to("SELECT string_agg(why, ', ' ORDER BY epoch_no) FROM (SELECT * FROM softmobile.outbox_epoch WHERE registered ORDER BY epoch_no OFFSET $epochs) e",
		'another server', "from $major: one new epoch");
	$new->sell_many('b1', 'D', 10);

	use_central($hq);
	$gateway = start_gateway();
	$new->node->append_conf('postgresql.conf', "softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'\n");
	$new->node->reload;
	$new->comes_to(q{SELECT string_agg(DISTINCT entity_id, ' ') FROM softmobile.sync_outbox WHERE status <> 'SENT'}, 'A-1', "from $major: all is sent but what an open conflict holds back");
	$new->sql(q{SELECT softmobile.resolve_conflict(id, 'local', 'asked the manager') FROM (SELECT DISTINCT id FROM softmobile.sync_conflicts) c});
	$new->drains("from $major: and that when it is decided");

	is($hq->safe_psql('postgres', 'SELECT id FROM softmobile.central_inbox ORDER BY id'), $new->sql('SELECT id FROM softmobile.outbox_event ORDER BY id'),
		"from $major: invariant 7: each event is at headquarters once");
	is($hq->safe_psql('postgres', q{SELECT row FROM softmobile.central_projection WHERE NOT deleted ORDER BY entity_type, entity_id}),
		$new->sql(join(' UNION ALL ', map { qq{SELECT * FROM (SELECT to_jsonb(t) FROM $_ t ORDER BY id COLLATE "C") $_} } qw(customer draft sale))),
		"from $major: headquarters' rows are the shop's");
	is($new->sql(q{SELECT string_agg(note, ', ' ORDER BY id) FROM sale WHERE id IN ('A-1', 'A-2', 'A-3')}), 'shop again, headquarters, shop', "from $major: as decided before and after");
	is($new->sql(q{SELECT bool_and(equal), count(*) > 3 FROM softmobile.verify_delivery('b1')}), 't|t', "from $major: verify_delivery() says equal, contents too");
	is($hq->safe_psql('postgres', 'SELECT count(*) FROM softmobile.central_fork'), 0, "from $major: no fork");
	$new->settled_is_contiguous("from $major: every number is settled");
	$new->stop;
	stop_gateway($gateway);
	$hq->stop;
	return;
}

stop_gateway($gateway);
$central->stop;
upgrade_from($_) foreach split ' ', $ENV{SM_OLD_PG_CONFIG} // '';
done_testing();

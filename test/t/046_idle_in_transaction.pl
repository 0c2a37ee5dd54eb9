# Invariant 3, seen from the worker: a psql left idle in a transaction after any
# of our functions stops nothing; others' events go on being delivered.

use strict;
use warnings;

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

append_to_file($token_file, $central->safe_psql('postgres', q{SELECT softmobile.central_create_token('{1, 2, 9, new}', 'shop')}));
chmod 0600, $token_file or die "chmod: $!";

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => [ 1, 2, 9 ],
	conf     => "softmobile.auth_token_file = '$token_file'\n");
my $node = $shop->node;
my $pid = $shop->worker_pid;

$shop->sql('CREATE TABLE plain (id integer PRIMARY KEY, branch text)');
$shop->sql('CREATE TABLE ventas (id integer PRIMARY KEY, sucursal_id text)');
$shop->sql("CREATE TABLE stock (id integer PRIMARY KEY, branch text)");
$shop->sql("INSERT INTO stock SELECT i, '1' FROM generate_series(1, 3000) AS i");
$shop->sql(q{CREATE TABLE ticket (id integer PRIMARY KEY, branch text, folio text, total numeric);
	SELECT softmobile.attach('ticket', 'ticket', branch_column => 'branch', folio_column => 'folio', amount_column => 'total')});
$shop->sell(1, 'first', 'conflicting');
$shop->change(q{INSERT INTO ticket VALUES (1, '1', 'T-1', 5)});
$shop->drains('the first sales');

# Something to decide on: an event that is rejected, one in conflict, a difference.
$central->safe_psql('postgres', q{SELECT softmobile.central_change('1', 'sale', 'conflicting',
	(SELECT row || '{"note": "headquarters"}' FROM softmobile.central_projection WHERE entity_id = 'conflicting'), 'price list')});
$shop->change(q{UPDATE sale SET note = 'shop' WHERE id = 'conflicting'}, q{INSERT INTO sale VALUES (repeat('x', 2001), '1')});
$shop->comes_to(q{SELECT string_agg(kind, ' ' ORDER BY kind) FROM softmobile.outbox_exception WHERE state = 'failed'}, 'conflict rejected', 'a rejected event, one in conflict');
$shop->sql(q{INSERT INTO softmobile.discrepancy (branch_id, kind, entity_type, entity_id, detail, session_id) VALUES ('1', 'different', 'ticket', '1', 'amount', 1)});

my $waiting = q{SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT' AND entity_id NOT IN ('conflicting', repeat('x', 2001))};

# what is done, in which a function is called; and a branch that is sold for meanwhile
my @idlers = (
	[ 'a sale', "SELECT softmobile.set_reason('a slow sale'), softmobile.current_reason(); INSERT INTO sale VALUES ('slow', '1')" ],
	[ 'register_branch of a new branch', "SELECT softmobile.register_branch('new', 'New')", 'new' ],
	[ 'register_branch of an old one', "SELECT softmobile.register_branch('9', 'Other name', active => false)" ],
	[ 'attach', "SELECT softmobile.attach('plain', 'plain', branch_column => 'branch')" ],
	[ 'attach of another priority', "SELECT softmobile.detach('draft'); SELECT softmobile.attach('draft', 'draft', branch_column => 'branch', priority => 'NORMAL')" ],
	[ 'attach_softmobile', 'SELECT softmobile.attach_softmobile()' ],
	[ 'detach', "SELECT softmobile.detach('customer')" ],
	[ 'requeue', "SELECT softmobile.requeue_failed_outbox_entries(min_age => '0')" ],
	[ 'retry', "SELECT count(*) FROM softmobile.sync_outbox_retry(ARRAY(SELECT id FROM softmobile.sync_outbox WHERE length(entity_id) = 2001), 'once more')" ],
	[ 'resend', "SELECT softmobile.resend('1', 'high', '{[1,2)}', 'lost at central')" ],
	[ 'resolve_conflict for the branch', "SELECT softmobile.resolve_conflict(id, 'local', 'asked the manager') FROM (SELECT DISTINCT id FROM softmobile.sync_conflicts) AS c" ],
	[ 'resolve_conflict for central', "SELECT softmobile.resolve_conflict(id, 'central', 'asked the manager') FROM (SELECT DISTINCT id FROM softmobile.sync_conflicts) AS c" ],
	[ 'sync_run', "SELECT status FROM softmobile.sync_run('1', '10 s')" ],
	[ 'prepare_offline', "SELECT count(*) FROM softmobile.prepare_offline('1', timeout => '10 s')" ],
	[ 'printers', "SELECT softmobile.confirm_printer('1', 'till 1'), softmobile.forget_printer('1', 'till 1')" ],
	[ 'record_backup', "SELECT softmobile.record_backup('pg_dump')" ],
	[ 'offline_checklist', "SELECT count(*) FROM softmobile.offline_checklist('1')" ],
	[ 'reconcile', "SELECT count(*) FROM softmobile.reconcile('1', '2020-01-01', '2030-01-01')" ],
	[ 'resolve_discrepancy', "SELECT softmobile.resolve_discrepancy(id, 'counted again') FROM softmobile.discrepancy" ],
	[ 'verify_delivery', "SELECT count(*) FROM softmobile.verify_delivery('1'); SELECT softmobile.ledger_of(1, 1); SELECT softmobile.numbers_of('{[1,9)}')" ],
	[ 'grants', "CREATE ROLE idler; SELECT softmobile.grant_role('idler', 'operator')" ],
	[ 'looking', "SELECT softmobile.sync_explain('T-1'); SELECT count(*) FROM softmobile.folio_control_of('1'); SELECT length(softmobile.metrics());
		SELECT * FROM softmobile.worker_status(); SELECT count(*) FROM softmobile.sync_outbox_page(); SELECT count(*) FROM softmobile.outbox_counts()" ],
	[ 'views', join(' ', map { "SELECT count(*) FROM softmobile.$_;" } qw(sync_outbox sync_outbox_stats sync_overview sync_history sync_conflicts sync_discrepancy sync_audit folio_control)) ],
);

# Of those that somebody is given, and those that set a server up, none is forgotten.
$shop->sql(join('; ', map { ("CREATE ROLE some_$_", "SELECT softmobile.grant_role('some_$_', '$_')") } qw(app operator auditor)));
my @functions = split(/\n/, $shop->sql(q{SELECT proname FROM pg_proc p WHERE pronamespace = 'softmobile'::regnamespace
	AND (proname IN ('attach', 'attach_softmobile', 'detach', 'grant_role') OR EXISTS (SELECT FROM unnest('{some_app, some_operator, some_auditor}'::text[]) AS r WHERE has_function_privilege(r, p.oid, 'EXECUTE')))}));
is_deeply([ grep { my $function = $_; !grep { $_->[1] =~ /softmobile\.$function\(/ } @idlers } @functions ], [], 'each of ' . @functions . ' functions is called');

my $number = 0;

foreach my $idler (@idlers)
{
	my ($what, $command, $branch) = @$idler;
	my $psql = $node->background_psql('postgres');
	$psql->query_safe("BEGIN; SET LOCAL softmobile.reason = 'left open'; $command;");
	$number++;
	$shop->sell(2, "other-$number");
	$shop->comes_to("SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id = 'other-$number' AND status = 'SENT'",
		1, "$what: another branch's sale is delivered");

	# A sale of the very branch that somebody is registering.
	$shop->sell($branch, "same-$number") if defined $branch;
	$psql->query_safe('ROLLBACK');
	$psql->quit;
	$shop->comes_to($waiting, 0, "$what: all is delivered in the end");
}

# A table whose existing rows are being queued, locked by somebody's DDL.
my $psql = $node->background_psql('postgres');
$psql->query_safe("BEGIN; SELECT softmobile.attach('stock', 'stock', branch_column => 'branch', initial => 'snapshot'); COMMIT; BEGIN; LOCK TABLE stock IN ACCESS EXCLUSIVE MODE;");
$shop->sell(2, 'beside');
$shop->comes_to(q{SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id = 'beside' AND status = 'SENT'},
	1, 'a locked table: sales of others are delivered');
$psql->query_safe('COMMIT');
$psql->quit;
$shop->comes_to(q{SELECT count(*) FROM softmobile.sync_outbox WHERE entity_type = 'stock' AND status = 'SENT'},
	3000, 'its rows follow when it is free');
is($shop->worker_pid, $pid, 'one worker did it all');

$shop->stop;
is(stop_gateway($gateway), 0, 'the gateway ends');
done_testing();

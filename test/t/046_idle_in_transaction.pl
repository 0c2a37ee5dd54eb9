# Invariant 3, seen from the worker: a psql left idle in a transaction after any
# of our functions stops nothing; others' events go on being delivered.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $central = SmReceiver->new;
my $shop = SmShop->new(url => $central->url, branches => [ 1, 2 ]);
my $node = $shop->node;
my $pid = $shop->worker_pid;

$shop->sql('CREATE TABLE plain (id integer PRIMARY KEY, branch text)');
$shop->sql("CREATE TABLE stock (id integer PRIMARY KEY, branch text)");
$shop->sql("INSERT INTO stock SELECT i, '1' FROM generate_series(1, 3000) AS i");
$shop->sell(1, 'first');
$shop->drains('the first sale');

my @idlers = (
	[ 'a sale', "SELECT softmobile.set_reason('a slow sale'); INSERT INTO sale VALUES ('slow', '1')" ],
	[ 'register_branch of a new branch', "SELECT softmobile.register_branch('new', 'New')", 'new' ],
	[ 'register_branch of an old one', "SELECT softmobile.register_branch('1', 'Other name', active => false)" ],
	[ 'attach', "SELECT softmobile.attach('plain', 'plain', branch_column => 'branch')" ],
	[ 'attach of another priority', "SELECT softmobile.detach('draft'); SELECT softmobile.attach('draft', 'draft', branch_column => 'branch', priority => 'NORMAL')" ],
	[ 'detach', "SELECT softmobile.detach('customer')" ],
	[ 'requeue', "SELECT softmobile.requeue_failed_outbox_entries(min_age => '0')" ],
	[ 'resend', "SELECT softmobile.resend('1', 'high', '{[1,2)}', 'lost at central')" ],
	[ 'grants', "CREATE ROLE idler; SELECT softmobile.grant_role('idler', 'operator')" ],
	[ 'views', 'SELECT count(*) FROM softmobile.sync_outbox; SELECT count(*) FROM softmobile.sync_outbox_stats' ],
);
my $number = 0;

foreach my $idler (@idlers)
{
	my ($what, $command, $branch) = @$idler;
	my $psql = $node->background_psql('postgres');
	$psql->query_safe("BEGIN; $command;");
	$number++;
	$shop->sell(2, "other-$number");
	$shop->comes_to("SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id = 'other-$number' AND status = 'SENT'",
		1, "$what: another branch's sale is delivered");

	# A sale of the very branch that somebody is registering.
	$shop->sell($branch, "same-$number") if defined $branch;
	$psql->query_safe('ROLLBACK');
	$psql->quit;
	$shop->drains("$what: all is delivered in the end");
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
$central->stop;
done_testing();

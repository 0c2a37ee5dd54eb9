# Dumps with events waiting: in parallel, in sections, and data alone.  (Other ways
# to dump are in 031_capture_restore.pl, what a restore does to the epoch in
# 045_epoch.pl.)

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
my $shop = SmShop->new(
	url      => $central->url,
	branches => [ 1, 2 ],
	init     => { extra => [ '--locale=C', '--encoding=UTF8' ] },
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.batch_max_events = 10\nmax_worker_processes = 20\n");
my $node = $shop->node;
my $dir = PostgreSQL::Test::Utils::tempdir;

# What came before and is delivered; what waits: changes of each lane, of a branch that nobody has registered, too.
$shop->sell_many(1, 'A', 20);
$shop->drains('the shop sells');
$central->refuse;
$shop->sell_many(1, 'B', 30);
$shop->sell(3, 'unknown');
$shop->change("INSERT INTO customer VALUES ('C-1', '2', 'áéí')", "UPDATE customer SET note = 'ñ' WHERE id = 'C-1'", "INSERT INTO draft VALUES ('D-1', '1')");
$shop->fails_with(qr/^offline$/, 'the link is down', 1);
$shop->comes_to("SELECT softmobile.recycle_segments('0 s')", 'segment 2 opened', 'the log goes on in another segment');
$shop->sell_many(1, 'E', 5);

my $log = q{SELECT count(*), md5(string_agg(e::text, '' ORDER BY id)) FROM softmobile.outbox_event e};
my $queue = q{SELECT count(*), md5(string_agg(id::text, '' ORDER BY id)) FROM softmobile.sync_outbox WHERE status <> 'SENT'};
my $rows = q{SELECT (SELECT count(*) FROM sale) || ' ' || (SELECT count(*) FROM customer) || ' ' || (SELECT count(*) FROM draft)};
my %before = map { $_ => $shop->sql($_) } $log, $queue, $rows;

like($before{$queue}, qr/^39\|/, 'events wait');
$node->command_ok([ 'pg_dump', '-Fd', '-j', '2', '-f', "$dir/parallel", '-d', $node->connstr('postgres') ], 'pg_dump, parallel');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dir/custom", '-d', $node->connstr('postgres') ], 'pg_dump, custom');
$node->command_ok([ 'pg_dump', '--data-only', '-f', "$dir/data.sql", '-d', $node->connstr('postgres') ], 'pg_dump, data only');

# An epoch's number tells the second it was opened in.
ok( $node->poll_query_until('postgres',
		"SELECT max(epoch_no) < 2 * floor(extract(epoch FROM clock_timestamp() - timestamptz '2020-01-01 00:00:00+00')) FROM softmobile.outbox_epoch"),
	'a second goes by');

# each: the commands that restore it
my %restore = (
	parallel => [ [ 'pg_restore', '--exit-on-error', '-j', '3', "$dir/parallel" ] ],
	sections => [ map { [ 'pg_restore', '--exit-on-error', "--section=$_", "$dir/custom" ] } qw(pre-data data post-data) ],
	data     => [
		[ 'pg_restore', '--exit-on-error', '--schema-only', "$dir/custom" ],
		[ 'pg_restore', '--exit-on-error', '--data-only', '--disable-triggers', "$dir/custom" ]
	]);

foreach my $way (sort keys %restore)
{
	$node->safe_psql('template1', "CREATE DATABASE $way TEMPLATE template0");
	$node->command_ok([ $_->[0], '-d', $node->connstr($way), @$_[ 1 .. $#$_ ] ], "$way: restored without an error") foreach @{ $restore{$way} };
	is($node->safe_psql($way, $_), $before{$_}, "$way: " . ($_ eq $log ? 'invariant 4: the log is as it was' : $_ eq $queue ? 'the queue, too' : 'and the rows'))
	  foreach $log, $queue, $rows;
}

# Each drains, and sells on.
my $events = () = $central->events;

$central->listen;
foreach my $way ('postgres', sort keys %restore)
{
	$node->safe_psql($way, "BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale SELECT '$way-' || i, '1' FROM generate_series(1, 10) i; COMMIT");
	ok($node->poll_query_until($way, "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'", '0'), "$way: drains");
	is(scalar(grep { $_->{subject} =~ /^$way-/ } $central->events), 10, "$way: invariant 7: no new event is taken for an old one");
}
is(scalar($central->events), $events + 39 + 10 * (1 + keys %restore), 'what all of them had in the queue takes effect once');

my (%id, %fork);

foreach my $event ($central->events)
{
	my $number = join(' ', @$event{qw(source epoch lane sequence)});

	$fork{$number} = 1 if exists $id{$number} && $id{$number} ne $event->{id};
	$id{$number} = $event->{id};
}
is_deeply([ keys %fork ], [], 'invariant 7: no number stands for two events');

# ---------------------------------------------------------------------------
# The jobs of a parallel restore load tables in an order of their own: here the log's first segment comes last, long after all
# others.  Its numbers must not be taken for those of transactions rolled back.

my $list = "$dir/list";
my $job = "$dir/first_segment";
my ($toc) = run_command([ 'pg_restore', '-l', "$dir/custom" ]);

append_to_file($list, join("\n", grep { /TABLE DATA|SEQUENCE SET/ && !/outbox_event_1 / } split(/\n/, $toc)) . "\n");
append_to_file($job, join("\n", grep { /TABLE DATA softmobile outbox_event_1 / } split(/\n/, $toc)) . "\n");
$node->safe_psql('template1', 'CREATE DATABASE jobs TEMPLATE template0');
$node->command_ok([ 'pg_restore', '--exit-on-error', '--section=pre-data', '-d', $node->connstr('jobs'), "$dir/custom" ], 'jobs: definitions');

my $job_at_work = do { local $ENV{PGAPPNAME} = 'pg_restore'; $node->background_psql('jobs') };

$node->command_ok([ 'pg_restore', '--exit-on-error', '-L', $list, '-d', $node->connstr('jobs'), "$dir/custom" ], 'jobs: all data but one table');
is($node->safe_psql('jobs', "SELECT status FROM softmobile.sync_run('1')"), 'success', 'jobs: the worker is at work');
is($node->safe_psql('jobs', "SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id LIKE 'E-%' AND status = 'SENT'"), '0',
	'... but leaves what the dump brought until the restore is over');
$node->command_ok([ 'pg_restore', '--exit-on-error', '-L', $job, '-d', $node->connstr('jobs'), "$dir/custom" ], 'jobs: the last table');
$job_at_work->quit;
ok($node->poll_query_until('jobs', "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'", '0'), 'jobs: drains');
is($node->safe_psql('jobs', q{SELECT count(*) FROM softmobile.outbox_event e JOIN softmobile.outbox_batch b ON b.kind = 'void' AND b.lane_id = e.lane_id AND b.members @> e.seq}),
	'0', 'jobs: invariant 5: no number of an event is void');

# ---------------------------------------------------------------------------
# Data without its triggers disabled: each row would be captured once more

$node->safe_psql('template1', 'CREATE DATABASE again TEMPLATE template0');
$node->command_ok([ 'pg_restore', '--exit-on-error', '--schema-only', '-d', $node->connstr('again'), "$dir/custom" ], 'schema only');
my ($ret, $out, $err) = $node->psql('again', undef, extra_params => [ '--single-transaction', '-f', "$dir/data.sql" ], on_error_stop => 1);
isnt($ret, 0, 'data only, triggers at work: refused');
like($err, qr/is not attached to softmobile/, 'it says why');
is($node->safe_psql('again', 'SELECT count(*) FROM softmobile.outbox_event'), '0', 'nothing is captured twice');

ok(!$node->log_contains(qr/softmobile worker.*(PANIC|was terminated by signal)/), 'no worker crashed');
$shop->stop;
done_testing();

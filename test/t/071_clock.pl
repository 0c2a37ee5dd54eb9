# The clock of the branch's server is set forward and back by hours: nothing waits for hours, and nothing is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmLocks;
use SmReceiver;
use SmShop;
use Test::More;
use Time::HiRes qw(time);

# What was reckoned by the wrong clock is due this much later at most (s).
use constant PROMPT => 30;

my $control = "$PostgreSQL::Test::Utils::tmp_check/clock";

# So many hours from now on; the shim is that of the campaign.
sub clock_is_off
{
	my ($hours) = @_;
	open(my $fh, -e $control ? '+<' : '>', $control) or die "$control: $!";
	syswrite($fh, pack('qq', 0, $hours * 3600 * 1_000_000));
	close($fh);
	return;
}

clock_is_off(0);
my $central = SmReceiver->new;
my $shop;
{
	local $ENV{LD_PRELOAD} = "$FindBin::RealBin/../modules/chaos_shim/chaos_shim.so";
	local $ENV{SM_CHAOS_SHIM} = $control;
	$shop = SmShop->new(url => $central->url, conf => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.batch_max_events = 20\n");
}
$shop->worker_pid;

# Something happens under a clock that is hours ahead, then the clock is set right: everything goes on at once.
sub set_back
{
	my ($name, $happens, $heal) = @_;

	clock_is_off(5);
	$happens->();
	clock_is_off(0);
	my $start = time;
	$heal->();
	$shop->drains("$name: everything arrives");
	cmp_ok(time - $start, '<', PROMPT, '... at once, not hours later');
	return;
}

clock_is_off(5);
is($shop->sql("SELECT now() > to_timestamp(" . time . ") + interval '4 hours'"), 't', 'the clock can be set');
clock_is_off(0);

set_back('the link was down', sub {
	$central->refuse;
	$shop->sell(1, 'down');
	$shop->fails_with(qr/^offline$/, 'the link is down');
}, sub { $central->listen });

set_back('central had answered 503', sub {
	$central->answer('status', status => 503);
	$shop->sell(1, 'busy');
	$shop->fails_with(qr/^http 503/, 'central is busy');
}, sub { $central->answer('receipt') });

set_back('central had answered 401', sub {
	$central->answer('status', status => 401);
	$shop->sell(1, 'token');
	$shop->fails_with(qr/^http 401/, 'central does not know the token');
}, sub { $central->answer('receipt') });

set_back('an event was rejected', sub {
	$central->answer('reject', subjects => { no => 'not today' });
	$shop->sell(1, 'yes', 'no');
	$shop->fails_with(qr/^rejected: not today/, 'an event is rejected');
}, sub { $central->answer('receipt') });

set_back('the worker was ended', sub {
	my $pid = $shop->worker_pid;
	$shop->sql("SELECT pg_terminate_backend($pid)");
	$shop->comes_to("SELECT count(*) FROM pg_stat_activity WHERE pid = $pid", 0, 'the worker is ended');
}, sub { $shop->sell(1, 'ended') });

# Who has all locks that there are room for keeps the launcher from looking at pg_database; what ends then, PostgreSQL would start hours later.
set_back('there was no shared memory', sub {
	my $node = $shop->node;
	my $log_position = -s $node->logfile;
	my $locker = $node->background_psql('postgres');
	$locker->query_safe('BEGIN; ' . SmLocks::all_there_are());
	$locker->query_safe("SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity(NULL) WHERE backend_type = 'softmobile worker'");
	$node->wait_for_log(qr/ERROR:  out of shared memory/, $log_position);
	$locker->quit;
}, sub { $shop->sell(1, 'locked') });

# The same with a server that starts while the clock is wrong, and finds a failed batch of the future.
set_back('the server was started', sub {
	$central->answer('status', status => 503);
	$shop->sell(1, 'started');
	$shop->fails_with(qr/^http 503/, 'central is busy');
}, sub {
	local $ENV{LD_PRELOAD} = "$FindBin::RealBin/../modules/chaos_shim/chaos_shim.so";
	local $ENV{SM_CHAOS_SHIM} = $control;
	$shop->node->restart;
	$central->answer('receipt');
});

# Back and forth, while selling.
foreach my $hours (3, -3, 10, -48, 0)
{
	clock_is_off($hours);
	$shop->sell(1, "hours $hours");
	$shop->change("UPDATE sale SET note = coalesce(note, '') || ' $hours' WHERE id = 'down'");
	$shop->drains("the clock is $hours hours off");
}
is(join('|', map { $_->{data}{new}{note} // 'new' } grep { $_->{subject} eq 'down' } $central->events), 'new| 3| 3 -3| 3 -3 10| 3 -3 10 -48| 3 -3 10 -48 0',
	'invariant 2: per entity in order, whatever the clock says');
is($shop->sql("SELECT string_agg(entity_id, ' ' ORDER BY entity_id) FROM softmobile.sync_outbox WHERE id IN (SELECT id FROM softmobile.outbox_event WHERE entity_id LIKE 'hours%')"),
	'hours -3 hours -48 hours 0 hours 10 hours 3', 'events are found by id, whatever their time');
$shop->all_arrived($central, 'the clock went back and forth');
$shop->settled_is_contiguous('invariant 5: settled is contiguous');
$shop->stop;
done_testing();

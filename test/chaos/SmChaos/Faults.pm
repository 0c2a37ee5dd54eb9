# The faults: what each does, and how it heals.  A fault belongs to a group, and one of a group
# strikes at a time; those of different groups overlap.
package SmChaos::Faults;

use strict;
use warnings;

use SmChaos::Process qw(is_alive wait_for);
use SmLocks;
use Time::HiRes qw(sleep);

=head2 all()

Each: name, group, weight, strike. strike gets the campaign and three numbers from 0 to 1,
which were drawn before; it returns undef when it is not possible now, else
{ seconds, heal } (both may be missing: nothing has to heal).

=cut

my @faults;

sub all { return @faults; }

sub fault
{
	my ($name, $group, $weight, $strike) = @_;
	push @faults, { name => $name, group => $group, weight => $weight, strike => $strike };
	return;
}

sub between { my ($low, $high, $u) = @_; return $low + ($high - $low) * $u; }

# --- the link ---

sub link_fault
{
	my ($name, $weight, $shortest, $longest, $mode, $options) = @_;

	fault($name, 'link', $weight, sub {
		my ($c, $u, $v) = @_;
		$c->{link}->fault($mode, ref $options eq 'CODE' ? $options->($v) : %{ $options // {} });
		return { seconds => between($shortest, $longest, $u), heal => sub { $c->{link}->heal } };
	});
	return;
}

link_fault('link refused',            3, 0.3, 3, 'refuse');
link_fault('link black-holed',        3, 0.5, 6, 'blackhole');
link_fault('reset mid-request',       3, 0.3, 3, 'reset');
link_fault('receipt lost',            4, 0.3, 3, 'lost');
link_fault('receipt cut off',         3, 0.3, 3, 'cut');
link_fault('one byte a second',       2, 1,   5, 'trickle');
link_fault('slow link',               2, 1,   4, 'slow', sub { (rate => 500 + int($_[0] * 20000)) });
link_fault('delay',                   2, 0.5, 4, 'delay', sub { (seconds => $_[0] * 2) });
link_fault('20 % of requests fail',   3, 1,   5, 'flaky', { percent => 20 });
link_fault('request doubled',         2, 0.5, 3, 'twice');
link_fault('request late',            3, 0.5, 3, 'late', sub { (seconds => 0.2 + $_[0] * 5) });
link_fault('http 500',                2, 0.3, 2, 'status', sub { (status => (500, 502, 503, 504)[ int($_[0] * 4) ]) });
link_fault('http 429, Retry-After',   2, 0.3, 2, 'status', { status => 429, headers => { 'Retry-After' => 1 } });
link_fault('http 401',                2, 0.3, 2, 'status', { status => 401 });
link_fault('http 403, 404, 405',      1, 0.3, 2, 'status', sub { (status => (403, 404, 405)[ int($_[0] * 3) ]) });
link_fault('http 408, 409, 425',      1, 0.3, 2, 'status', sub { (status => (408, 409, 425)[ int($_[0] * 3) ]) });
link_fault('http 413',                1, 0.2, 1, 'status', { status => 413, only => 'events' });
link_fault('http 415',                1, 0.2, 1, 'status', { status => 415, only => 'events' });
link_fault('http 400, 422',           2, 0.2, 1, 'status', sub { (status => $_[0] < 0.5 ? 400 : 422, only => 'events') });
link_fault('redirect',                1, 0.3, 2, 'status', { status => 302, headers => { Location => 'http://127.0.0.1:9/' } });
link_fault('empty answer',            2, 0.3, 2, 'empty');
link_fault('captive portal',          2, 0.3, 2, 'portal');
link_fault('garbage',                 2, 0.3, 2, 'garbage');
link_fault('lying receipt',           3, 0.3, 2, 'lie',
	sub { (how => (qw(counts negative fraction foreign missing text array))[ int($_[0] * 7) ]) });

fault('name not found', 'link', 1, sub {
	my ($c, $u) = @_;
	return undef unless $c->{shop}->is_ready && defined $c->{shop}->sql("ALTER DATABASE postgres SET softmobile.central_url = 'http://central.invalid:80'");
	return { seconds => between(0.5, 4, $u), heal => sub { $c->set_url }, retry => 1 };
});

# --- processes of the branch ---

sub branch_signal
{
	my ($name, $weight, $signal, $pattern, $possible) = @_;

	fault($name, 'branch', $weight, sub {
		my ($c, $u, $v) = @_;
		return undef if $possible && !$possible->($c);
		return $c->{shop}->is_ready && $c->{shop}->signal($signal, $pattern, $v) ? {} : undef;
	});
	return;
}

branch_signal('kill -9 of the worker',    6, 'KILL', qr/^postgres: softmobile worker /);
branch_signal('kill -9 of the launcher',  3, 'KILL', qr/^postgres: softmobile launcher/);
branch_signal('kill -9 of a till',        4, 'KILL', qr/^postgres: seller /);
branch_signal('kill -9 of WAL writer, checkpointer', 2, 'KILL', qr/^postgres: (walwriter|checkpointer|background writer)/);
branch_signal('worker terminated',        3, 'TERM', qr/^postgres: softmobile worker /);
# Not while the clock is wrong: the postmaster would start it again hours later, by the right one.
branch_signal('launcher terminated',      2, 'TERM', qr/^postgres: softmobile launcher/, sub { $_[0]{shop}{clock} == 0 });
branch_signal('till terminated',          2, 'TERM', qr/^postgres: seller /);

fault('worker stands still', 'branch', 2, sub {
	my ($c, $u) = @_;
	my ($pid) = $c->{shop}->is_ready ? $c->{shop}->processes(qr/^postgres: softmobile worker /) : ();
	return undef unless $pid;
	kill 'STOP', $pid;
	return { seconds => between(0.5, 5, $u), heal => sub { kill 'CONT', $pid if grep { $_ == $pid } $c->{shop}->processes } };
});

sub server_stop
{
	my ($name, $group, $which, $weight, $signal) = @_;

	fault($name, $group, $weight, sub {
		my ($c, $u) = @_;
		my $server = $c->{$which};
		return undef unless $server->is_ready;
		$server->stop($signal);
		return { seconds => between(0, 2, $u), heal => sub { $server->start } };
	});
	return;
}

server_stop('kill -9 of the postmaster', 'branch', 'shop', 4, 'KILL');
server_stop('fast stop',                 'branch', 'shop', 3, 'INT');
server_stop('immediate stop',            'branch', 'shop', 4, 'QUIT');

fault('killed again while it starts', 'branch', 2, sub {
	my ($c, $u, $v) = @_;
	my $shop = $c->{shop};
	return undef unless $shop->is_ready;
	foreach my $after (0, between(0.05, 0.6, $u), between(0.05, 1.5, $v))
	{
		sleep($after);
		$shop->stop('KILL');
		$shop->start;
	}
	return {};
});

fault('power loss', 'branch', 5, sub {
	my ($c, $u) = @_;
	return undef unless $c->{shop}->is_ready;
	$c->note('  without the WAL that was not flushed') if $c->{shop}->lose_power;
	return { seconds => between(0, 1, $u), heal => sub { $c->{shop}->start } };
});

fault('two worker generations', 'branch', 2, sub {
	my ($c, $u) = @_;
	# rows that are being queued would get numbers on both sides: that is a fork, and none of ours to judge
	return undef unless $c->{shop}->is_ready && ($c->{shop}->sql('SELECT count(*) FROM softmobile.outbox_snapshot') // 1) == 0;
	# What is committed but not flushed yet would be in the history of the one and not of the other: whoever commits now flushes it.
	if (!$c->{load}->pause || !defined $c->{shop}->sql('SELECT pg_current_xact_id()'))
	{
		$c->{load}->resume;
		return undef;
	}
	my ($go_on, $end) = $c->{shop}->copy_running;
	$go_on->();
	$c->{load}->resume;
	return { seconds => between(1, 4, $u), heal => $end };
});

fault('out of worker processes', 'branch', 2, sub {
	my ($c, $u) = @_;
	return undef unless $c->{shop}->is_ready;
	$c->{shop}->extra_conf("max_worker_processes = 2\n");
	$c->{shop}->stop('INT');
	$c->{shop}->start;
	return {
		seconds => between(2, 5, $u),
		heal => sub {
			$c->{shop}->extra_conf('');
			$c->{shop}->stop('INT');
			$c->{shop}->start;
		}
	};
});

fault('out of shared memory', 'branch', 2, sub {
	my ($c, $u) = @_;
	return undef unless $c->{shop}->is_ready;
	$c->{load}->in_background('locker', 'BEGIN; ' . SmLocks::all_there_are() . '; SELECT pg_sleep(600); COMMIT', 'locker');
	# by a signal, for nobody can connect, and a sleep ends by the clock, which may jump
	return { seconds => between(0.5, 3, $u), heal => sub { $c->{shop}->signal('TERM', qr/^postgres: locker /, 0) } };
});

# --- the branch's disks and clock ---

sub disk_fault
{
	my ($name, $weight, $which) = @_;

	fault($name, 'disk', $weight, sub {
		my ($c, $u) = @_;
		$c->{shop}->set_shim($which, $c->{shop}{clock});
		return { seconds => between(0.5, 4, $u), heal => sub { $c->{shop}->set_shim(0, $c->{shop}{clock}) } };
	});
	return;
}

disk_fault('disk full',                3, 1);
disk_fault("the log's own disk full",  3, 2);

fault('clock jumps', 'clock', 3, sub {
	my ($c, $u, $v) = @_;
	$c->{shop}->set_shim($c->{shop}{disk_full}, int(between(-6, 6, $v) * 3600));
	return { seconds => between(0.5, 6, $u), heal => sub { $c->{shop}->set_shim($c->{shop}{disk_full}, 0) } };
});

# --- central and the gateway ---

server_stop("kill -9 of central's postmaster", 'central', 'central', 3, 'KILL');
server_stop("central's fast stop",             'central', 'central', 2, 'INT');
server_stop("central's immediate stop",        'central', 'central', 3, 'QUIT');

fault("kill -9 of central's backend", 'central', 3, sub {
	my ($c, $u, $v) = @_;
	return $c->{central}->is_ready && $c->{central}->signal('KILL', qr/^postgres: gateway /, $v) ? {} : undef;
});

fault("central's power loss", 'central', 2, sub {
	my ($c, $u) = @_;
	return undef unless $c->{central}->is_ready;
	$c->{central}->lose_power;
	return { seconds => between(0, 1, $u), heal => sub { $c->{central}->start } };
});

fault("central's inbox locked", 'central', 2, sub {
	my ($c, $u) = @_;
	return undef unless $c->{central}->is_ready;
	$c->{load}->in_background('inbox_locker', sprintf("BEGIN; LOCK TABLE softmobile.central_inbox; SELECT pg_sleep(%.1f); COMMIT;\n", between(0.5, 7, $u)), 'postgres', $c->{central});
	return {};
});

fault("central's disk full", 'central', 2, sub {
	my ($c, $u) = @_;
	$c->{central}->set_shim(1, 0);
	return { seconds => between(0.5, 4, $u), heal => sub { $c->{central}->set_shim(0, 0) } };
});

fault("central's clock jumps", 'central', 1, sub {
	my ($c, $u, $v) = @_;
	$c->{central}->set_shim(0, int(between(-6, 6, $v) * 3600));
	return { seconds => between(0.5, 4, $u), heal => sub { $c->{central}->set_shim(0, 0) } };
});

fault('kill -9 of the gateway', 'gateway', 3, sub {
	my ($c, $u) = @_;
	$c->stop_gateway('KILL');
	return { seconds => between(0, 2, $u), heal => sub { $c->start_gateway }, retry => 1 };
});

fault('gateway terminated', 'gateway', 2, sub {
	my ($c, $u) = @_;
	$c->stop_gateway('TERM');
	return { seconds => between(0, 2, $u), heal => sub { $c->start_gateway }, retry => 1 };
});

fault('gateway stands still', 'gateway', 2, sub {
	my ($c, $u) = @_;
	my $pid = $c->{gateway};
	return undef unless is_alive($pid);
	kill 'STOP', $pid;
	return { seconds => between(0.5, 5, $u), heal => sub { kill 'CONT', $pid if is_alive($pid) } };
});

fault('token revoked', 'gateway', 1, sub {
	my ($c, $u) = @_;
	return undef unless $c->{central}->is_ready && defined $c->{central}->sql("SELECT softmobile.central_revoke_token('chaos')");
	return { seconds => between(0.3, 2, $u), heal => sub { $c->make_token }, retry => 1 };
});

# --- things that people do meanwhile, which must harm nothing ---

sub operation
{
	my ($name, $weight, $sql) = @_;

	fault($name, 'people', $weight, sub {
		my ($c, $u, $v) = @_;
		return undef unless $c->{shop}->is_ready;
		$c->{load}->in_background('people', "SET softmobile.reason = 'Prueba de fallos';\n" . (ref $sql ? $sql->($v) : $sql) . ";\n", 'postgres');
		return {};
	});
	return;
}

operation('sync_run()',      2, "SELECT * FROM softmobile.sync_run('b1', '5 s')");
operation('requeue',         2, "SELECT softmobile.requeue_failed_outbox_entries(min_age => '0 s')");
operation('retry',           1, "SELECT count(*) FROM softmobile.sync_outbox_retry(ARRAY(SELECT id FROM softmobile.sync_outbox WHERE status = 'FAILED' LIMIT 50))");
operation('sent once more',  2, sub {
	my ($v) = @_;
	return "SELECT softmobile.resend('b2', 'high', int8multirange(int8range(x, x + 100)), 'Prueba de fallos')
		FROM (SELECT (max(upper(settled)) * $v)::bigint + 1 AS x FROM softmobile.outbox_lane WHERE branch_id = 'b2' AND priority = 'HIGH'
			AND epoch_no = (SELECT max(epoch_no) FROM softmobile.outbox_epoch WHERE registered)) AS s";
});
operation('new epoch',       1, "SELECT softmobile.open_epoch('chaos') WHERE (SELECT count(*) FROM softmobile.outbox_epoch) < 40");
operation('table attached with its rows', 1, sub { SmChaos::attach_catalogue() });
operation('priority changed', 1, q{DO $$
	BEGIN
		IF (SELECT count(*) < 40 FROM softmobile.outbox_epoch) THEN
			PERFORM softmobile.detach('draft');
			PERFORM softmobile.attach('draft', 'draft', branch_column => 'branch', priority => CASE e.priority WHEN 'LOW' THEN 'NORMAL' ELSE 'LOW' END)
			FROM softmobile.outbox_entity e WHERE e.entity_type = 'draft';
		END IF;
	END $$});
operation('a report is read slowly', 1, sub { sprintf("BEGIN; SELECT count(*) FROM softmobile.sync_outbox; SELECT pg_sleep(%.1f); COMMIT", between(1, 10, $_[0])) });
operation('VACUUM FULL, REINDEX',    1, sub {
	return ((map { "VACUUM FULL softmobile.$_" } qw(outbox_lane outbox_batch outbox_exception)), (map { "REINDEX TABLE softmobile.outbox_event_$_" } 1 .. 4))[ int($_[0] * 7) ];
});
operation('verify_delivery()', 1, "SELECT count(*) FROM softmobile.verify_delivery('b3')");

1;

=head1 NAME

SmChaos - a shop sells while everything around it breaks

=head1 SYNOPSIS

  my $campaign = SmChaos->new(dir => $dir, bin => $bin, gateway => $program, tree => $tree,
      seed => 7, faults => 40, minutes => 60);
  my $verdict = $campaign->run;       # { committed, lost, doubled, ... }
  print $campaign->report;

=head1 DESCRIPTION

A branch server, a central server, a gateway and a bad link between them (SmProxy), all
made in dir and ended with the campaign.  The sequence of faults, their lengths and the
pauses between them follow from the seed; what the processes are doing when a fault
strikes does not.  Everything that is done stands in dir/chaos.log.

The branch keeps a record of its own of every committed change (branch.sql), with plain
triggers and in the same transaction; that is what central is compared with.

=cut

package SmChaos;

use strict;
use warnings;

use File::Temp ();
use POSIX ();
use SmChaos::Faults;
use SmChaos::Load;
use SmChaos::Process qw(spawn is_alive end_process wait_for);
use SmChaos::Server;
use SmProxy;
use Time::HiRes qw(sleep time);

# How long the end may take: everything healed, everything drained (s).
use constant DRAIN => 180;

# A fault that is not possible for so long is left out (s).
use constant PATIENCE => 20;

=head2 new(%options)

dir: an empty directory; bin: of PostgreSQL; gateway: the program; tree: of the
project; seed; faults: how many; minutes: how long at most; pause: mean
time between faults (1 s); say: a function for progress.

=cut

sub new
{
	my ($class, %options) = @_;
	my $self = bless {
		seed => 1, faults => 50, minutes => 60, pause => 1, say => sub { }, %options,
		count => {}, operations => {}, skipped => {}, active => {}, overlapped => 0
	}, $class;
	my $sockets = File::Temp->newdir('smchaos.XXXXXX', TMPDIR => 1);
	my $shim = "$self->{tree}/test/modules/chaos_shim/chaos_shim.so";

	open($self->{log}, '>>', "$self->{dir}/chaos.log") or die "$self->{dir}/chaos.log: $!";
	$self->{log}->autoflush(1);
	$self->{started} = time();
	$self->{sockets} = $sockets;
	foreach my $server ([ 'shop', 6720 ], [ 'central', 6730 ])
	{
		my ($name, $port) = @$server;
		$self->{$name} = SmChaos::Server->new(
			name => $name, port => $port, dir => "$self->{dir}/$name", sockets => "$sockets", bin => $self->{bin}, shim => $shim,
			conf => $self->settings($name));
	}
	return $self;
}

# The WAL is written late, so that a crash loses what was not flushed on purpose.
sub settings
{
	my ($self, $name) = @_;
	my $common = "fsync = off\nrestart_after_crash = on\nmax_connections = 60\nshared_buffers = 32MB\nlog_line_prefix = '%m [%p] %q%u '\n"
	  . "log_min_messages = warning\nmax_wal_size = 64MB\ncheckpoint_timeout = 30s\nlog_checkpoints = off\n";

	return $common if $name eq 'central';
	return $common . join("\n", "shared_preload_libraries = 'softmobile'", 'max_prepared_transactions = 40', 'wal_writer_delay = 10s', 'wal_writer_flush_after = 1GB',
		"softmobile.probe_interval = 1s", 'softmobile.retry_interval = 2s', 'softmobile.connect_timeout = 1s', 'softmobile.request_timeout = 3s',
		'softmobile.sync_interval = 15s', 'softmobile.batch_max_events = 100', 'softmobile.max_attempts = 1000', "softmobile.worker_role = 'worker'",
		'softmobile.retention = 1min', '');
}

sub note
{
	my ($self, $text) = @_;
	printf { $self->{log} } "%8.2f %s\n", time() - $self->{started}, $text;
	return;
}

# --- the parts ---

sub set_up
{
	my ($self) = @_;
	my ($shop, $central) = @$self{qw(shop central)};

	$_->start foreach $shop, $central;
	$_->await_ready foreach $shop, $central;
	$central->must(q{CREATE EXTENSION softmobile; CREATE ROLE gateway LOGIN; SELECT softmobile.grant_central('gateway')});
	$self->make_token;
	$self->start_gateway;
	$self->{link} = SmProxy->new(target => $self->{gateway_port}, seed => $self->{seed}, lifetime => $self->{minutes} * 60 + 3600);
	$shop->must(q{CREATE ROLE worker LOGIN; CREATE EXTENSION softmobile; SELECT softmobile.grant_role('worker', 'worker')});
	$self->move_log;
	$self->set_url or die "the central URL cannot be set\n";
	$shop->must("ALTER DATABASE postgres SET softmobile.auth_token_file = '$self->{dir}/token'");
	$shop->must("SET softmobile.reason = 'Apertura';\n" . _slurp("$self->{tree}/test/chaos/branch.sql"));
	$shop->must('CREATE ROLE locker LOGIN');
	$shop->must(q{CREATE ROLE seller LOGIN; SELECT softmobile.grant_role('seller', 'app'); GRANT ALL ON ALL TABLES IN SCHEMA public TO seller; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO seller});
	$self->{load} = SmChaos::Load->new(server => $shop, dir => $self->{dir}, scripts => "$self->{tree}/test/chaos/load", seed => $self->{seed});
	return;
}

# The log's files have a disk of their own (chaos_shim.c), which is copied and lost with the rest.
sub move_log
{
	my ($self) = @_;
	my $shop = $self->{shop};

	$shop->must("SET allow_in_place_tablespaces = on;\nCREATE TABLESPACE log LOCATION ''");
	$shop->must($_) foreach split(/\n/, $shop->must(q{SELECT format('ALTER %s %s SET TABLESPACE log', CASE c.relkind WHEN 'i' THEN 'INDEX' ELSE 'TABLE' END, c.oid::regclass)
		FROM pg_class c LEFT JOIN pg_index x ON x.indexrelid = c.oid
		WHERE c.relkind IN ('r', 'i') AND coalesce(x.indrelid, c.oid) IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'softmobile.outbox_event'::regclass)}));
	return;
}

# A token for all branches, in the file that the branch reads.
sub make_token
{
	my ($self) = @_;
	my $token = $self->{central}->sql(q{SELECT softmobile.central_create_token(ARRAY['b1', 'b2', 'b3', 'n1', 'n2', 'n3', 'n4', 'n5', 'n6'], 'chaos')});

	return 0 unless $token;
	open(my $fh, '>', "$self->{dir}/token.new") or die $!;
	chmod 0600, $fh;
	print $fh $token;
	close($fh) or die $!;
	rename("$self->{dir}/token.new", "$self->{dir}/token") or die $!;
	return 1;
}

# Once; a second call does nothing.
sub attach_catalogue
{
	return q{SELECT softmobile.attach('catalogue', 'catalogue', branch_column => 'branch', initial => 'snapshot')
		WHERE NOT EXISTS (SELECT FROM softmobile.captured_table WHERE relation = 'catalogue'::regclass)};
}

sub set_url
{
	my ($self) = @_;
	return $self->{shop}->is_ready && defined $self->{shop}->sql("ALTER DATABASE postgres SET softmobile.central_url = '" . $self->{link}->url . "'");
}

# On the port that it had before.
sub start_gateway
{
	my ($self) = @_;
	my $port = $self->{gateway_port} // 0;
	my $out = "$self->{dir}/gateway.log";
	my $from = -s $out // 0;

	return 1 if is_alive($self->{gateway});
	$self->{gateway} = spawn($out, $self->{dir}, {}, $self->{gateway_program}, '--listen', "127.0.0.1:$port", '--timeout', 5,
		'--database', "host=$self->{sockets} port=$self->{central}{port} dbname=postgres user=gateway");
	wait_for(10, sub { substr(_slurp($out), $from) =~ /^listening on \S+:(\d+)$/m ? $self->{gateway_port} = $1 : !is_alive($self->{gateway}) });
	return is_alive($self->{gateway});
}

sub stop_gateway
{
	my ($self, $signal) = @_;
	kill 'CONT', $self->{gateway} if is_alive($self->{gateway});
	end_process($self->{gateway}, $signal);
	return;
}

# --- the campaign ---

# The next fault with all that chance has to say about it.
sub draw
{
	my ($self) = @_;
	my @faults = SmChaos::Faults::all();
	my $sum = 0;
	$sum += $_->{weight} foreach @faults;
	my $at = rand($sum);
	my ($fault) = grep { ($at -= $_->{weight}) < 0 } @faults;

	return { fault => $fault // $faults[-1], chance => [ rand(), rand(), rand() ], pause => -log(1 - rand()) * $self->{pause} };
}

# Keeps up what should be up, heals what is due.
sub tend
{
	my ($self) = @_;

	$_->tend foreach @$self{qw(shop central)};
	foreach my $group (sort keys %{ $self->{active} })
	{
		my $active = $self->{active}{$group};

		next if time() < $active->{until};
		delete $self->{active}{$group};
		$self->heal($group, $active);
	}
	$self->{load}->tend;
	return;
}

sub heal
{
	my ($self, $group, $active) = @_;

	my $done = $active->{heal} ? $active->{heal}->() : 1;

	# what needs a server that is down is tried again
	if ($active->{retry} && !$done)
	{
		$self->{active}{$group} = { %$active, until => time() + 0.5 };
		return;
	}
	$self->note("healed: $active->{name}");
	return;
}

sub strike
{
	my ($self, $next) = @_;
	my $fault = $next->{fault};
	my $struck = $fault->{strike}->($self, @{ $next->{chance} });

	return 0 unless $struck;
	if ($fault->{group} eq 'people')
	{
		$self->{operations}{ $fault->{name} }++;
		$self->note("people: $fault->{name}");
		return 1;
	}
	$self->{count}{ $fault->{name} }++;
	$self->{overlapped}++ if %{ $self->{active} };
	$self->note(sprintf 'fault %d: %s%s%s', $self->total, $fault->{name}, defined $struck->{seconds} ? sprintf(' for %.1f s', $struck->{seconds}) : '',
		%{ $self->{active} } ? ', during ' . join(', ', map { $_->{name} } values %{ $self->{active} }) : '');
	$self->{active}{ $fault->{group} } = { name => $fault->{name}, heal => $struck->{heal}, retry => $struck->{retry}, until => time() + ($struck->{seconds} // 0.2) };
	return 1;
}

sub total
{
	my ($self) = @_;
	my $sum = 0;
	$sum += $_ foreach values %{ $self->{count} };
	return $sum;
}

sub run
{
	my ($self) = @_;
	local $SIG{PIPE} = 'IGNORE';

	srand($self->{seed});
	$self->set_up;
	$self->note("seed $self->{seed}, $self->{faults} faults");
	my $end = time() + $self->{minutes} * 60;
	my $said = time();

	while ($self->total < $self->{faults} && time() < $end)
	{
		my $next = $self->draw;
		my $due = time() + $next->{pause};
		my $too_late = $due + PATIENCE;

		while (1)
		{
			$self->tend;
			if (time() >= $due && !$self->{active}{ $next->{fault}{group} })
			{
				last if $self->strike($next);
			}
			if (time() > $too_late)
			{
				$self->{skipped}{ $next->{fault}{name} }++;
				last;
			}
			sleep 0.02;
		}
		if (time() > $said + 60)
		{
			$said = time();
			$self->{say}->(sprintf '%d faults in %d s', $self->total, $said - $self->{started});
		}
	}
	return $self->conclude;
}

# --- the end ---

sub conclude
{
	my ($self) = @_;
	my ($shop, $central) = @$self{qw(shop central)};

	$self->{struck_for} = time() - $self->{started};
	$_->{until} = 0 foreach values %{ $self->{active} };
	$self->tend;
	$self->{link}->heal;
	$_->set_shim(0, 0) foreach $shop, $central;
	foreach my $server ($shop, $central)
	{
		$server->start;
		$server->await_ready;
	}
	$self->start_gateway or die "the gateway does not start\n";
	$self->make_token;
	wait_for(30, sub { $self->set_url }) or die "the central URL cannot be set\n";
	$self->note('all is healed');
	$self->{load}->tend;
	sleep 2;
	$self->{load}->pause or die "somebody still sells\n";
	$shop->must(SmChaos::Load::prepared_ended('true'));
	$shop->must("SET softmobile.reason = 'Cierre';\n" . attach_catalogue());
	$self->note('nobody sells any more');
	return $self->{verdict} = { %{ $self->drain }, %{ $self->compare }, %{ $self->verify } };
}

sub drain
{
	my ($self) = @_;
	my $started = time();
	my $left;

	wait_for(DRAIN, sub {
		$self->{shop}->tend;
		$left = $self->{shop}->sql(q{SELECT (SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT') + (SELECT count(*) FROM softmobile.outbox_snapshot),
			-- numbers that belong to no event are known to be void: the settled ones are a range without a hole
			(SELECT count(*) FROM softmobile.outbox_lane_state WHERE lane_id = log_id AND branch_id IS NOT NULL
				AND settled_all <> '{}' AND settled_all <> int8multirange(int8range(1, upper(settled_all))))}, 60) // '-1|-1';
		sleep 0.2 if $left ne '0|0';
		return $left eq '0|0';
	});
	my ($waiting, $unsettled) = split(/\|/, $left);
	$self->{drained_in} = time() - $started;
	$self->note(sprintf 'drained for %.1f s, %d events wait, %d lanes have holes', $self->{drained_in}, $waiting, $unsettled);
	return { waiting => $waiting, lanes_not_settled => $unsettled };
}

sub copy_to_central
{
	my ($self, $query, $table) = @_;
	my $file = "$self->{dir}/$table.copy";
	$self->{shop}->must("\\copy ($query) TO '$file'", 600);
	$self->{central}->must("\\copy $table FROM '$file'", 600);
	return;
}

sub compare
{
	my ($self) = @_;
	my $rows = _slurp("$self->{tree}/test/chaos/branch_rows.sql") =~ s/\s+/ /gr;

	$self->{central}->must(q{DROP SCHEMA IF EXISTS chaos CASCADE; CREATE SCHEMA chaos;
		CREATE TABLE chaos.truth (n bigint, branch_id text COLLATE "C", entity_type text COLLATE "C", entity_id text COLLATE "C", op text COLLATE "C", stamp bigint, row jsonb);
		CREATE TABLE chaos.branch_row (branch_id text COLLATE "C", entity_type text COLLATE "C", entity_id text COLLATE "C", row jsonb)});
	$self->copy_to_central('SELECT * FROM truth', 'chaos.truth');
	$self->copy_to_central($rows, 'chaos.branch_row');
	$self->{central}->must(_slurp("$self->{tree}/test/chaos/compare.sql"), 1200);
	my @names = split(/\|/, $self->{central}->must(q{SELECT string_agg(attname, '|' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'chaos.verdict'::regclass AND attnum > 0}));
	my @values = split(/\|/, $self->{central}->must('SELECT * FROM chaos.verdict'));
	my %verdict;
	@verdict{@names} = @values;
	return \%verdict;
}

# What the product itself says.
sub verify
{
	my ($self) = @_;
	my $shop = $self->{shop};
	my ($lanes, $equal) = split(/\|/, $shop->must(q{SELECT count(*), count(*) FILTER (WHERE v.equal) FROM softmobile.branch b, softmobile.verify_delivery(b.branch_id) v}, 600));
	my $exceptions = $shop->must(q{SELECT count(*) FROM softmobile.outbox_exception WHERE state IN ('failed', 'queued')}, 60);
	return { lanes => $lanes, lanes_not_equal => $lanes - $equal, exceptions => $exceptions };
}

# What must be 0.
sub wrong
{
	my ($self) = @_;
	return grep { $self->{verdict}{$_} }
	  qw(waiting lost never_committed doubled out_of_order altered rows_that_differ forks conflicts lanes_not_equal lanes_not_settled exceptions);
}

sub report
{
	my ($self) = @_;
	my $v = $self->{verdict};
	my @lines = ("seed $self->{seed}: " . $self->total . " faults in " . int($self->{struck_for}) . " s, $self->{overlapped} of them while another lasted");

	push @lines, sprintf('%6d  %s', $self->{count}{$_}, $_) foreach sort { $self->{count}{$b} <=> $self->{count}{$a} || $a cmp $b } keys %{ $self->{count} };
	push @lines, 'operations meanwhile: ' . join(', ', map { "$_ $self->{operations}{$_}" } sort keys %{ $self->{operations} }) if %{ $self->{operations} };
	push @lines, 'not possible in time: ' . join(', ', map { "$_ ($self->{skipped}{$_})" } sort keys %{ $self->{skipped} }) if %{ $self->{skipped} };
	my $hits = $self->{link}->hits;
	push @lines, 'requests that met a fault of the link: ' . join(', ', map { "$_ $hits->{$_}" } sort keys %$hits);
	push @lines, "committed changes $v->{committed}, events at central $v->{arrived}, drained in " . int($self->{drained_in}) . " s; rows compared $v->{rows}; lanes verified $v->{lanes}";
	push @lines, join(', ', map { (my $name = $_) =~ tr/_/ /; "$name $v->{$_}" }
		  qw(lost never_committed doubled out_of_order altered rows_that_differ waiting exceptions forks conflicts lanes_not_equal lanes_not_settled));
	return join("\n", @lines) . "\n";
}

# Of everything that is wrong the first few, for whoever looks for the cause.
sub evidence
{
	my ($self) = @_;
	my @asked = (
		[ 'shop', 'waiting', q{SELECT id, branch_id, entity_type, entity_id, operation, status, attempt_count, last_attempt_at, error_message, created_at
			FROM softmobile.sync_outbox WHERE status <> 'SENT' ORDER BY created_at LIMIT 20} ],
		[ 'shop', 'worker', 'SELECT * FROM softmobile.worker_status()' ],
		[ 'shop', 'lanes', q{SELECT lane_id, log_id, branch_id, priority, epoch_no, status, attempt_count, next_attempt_at, error_message
			FROM softmobile.outbox_lane WHERE status <> 'idle'} ],
		[ 'shop', 'not settled', q{SELECT lane_id, branch_id, priority, epoch_no, settled_all FROM softmobile.outbox_lane_state WHERE lane_id = log_id
			AND branch_id IS NOT NULL AND settled_all <> '{}' AND settled_all <> int8multirange(int8range(1, upper(settled_all)))} ],
		[ 'shop', 'exceptions', q{SELECT id, lane_id, seq, entity_id, kind, state, waits_for, error_message FROM softmobile.outbox_exception WHERE state IN ('failed', 'queued') LIMIT 20} ],
		[ 'shop', 'not equal', q{SELECT b.branch_id, v.* FROM softmobile.branch b, softmobile.verify_delivery(b.branch_id) v WHERE NOT v.equal} ],
		[ 'central', 'lost', q{SELECT * FROM chaos.truth t WHERE NOT EXISTS (SELECT FROM chaos.arrived a
			WHERE (a.branch_id, a.entity_type, a.entity_id, a.op, a.stamp) = (t.branch_id, t.entity_type, t.entity_id, t.op, t.stamp)) ORDER BY n LIMIT 20} ],
		[ 'central', 'never committed', q{SELECT * FROM chaos.arrived a WHERE NOT EXISTS (SELECT FROM chaos.truth t
			WHERE (a.branch_id, a.entity_type, a.entity_id, a.op, a.stamp) = (t.branch_id, t.entity_type, t.entity_id, t.op, t.stamp)) LIMIT 20} ],
		[ 'central', 'out of order', q{SELECT * FROM chaos.pair WHERE place <> place_at_central OR effect = 'older' LIMIT 20} ],
		[ 'central', 'rows that differ', q{SELECT branch_id, entity_type, entity_id, b.row AS branch, p.row AS central, p.epoch_no, p.seq
			FROM chaos.branch_row b FULL JOIN (SELECT * FROM softmobile.central_projection WHERE NOT deleted) p
			USING (branch_id, entity_type, entity_id) WHERE b.row IS DISTINCT FROM p.row LIMIT 20} ],
		[ 'central', 'forks', 'SELECT * FROM softmobile.central_forks LIMIT 20' ],
		[ 'central', 'conflicts', 'SELECT * FROM softmobile.central_conflicts LIMIT 20' ]);
	my $text = '';

	foreach my $question (@asked)
	{
		my ($server, $name, $sql) = @$question;
		my ($ok, $out, $err) = $self->{$server}->sql($sql, 120);

		$out = $err unless $ok;
		$text .= "-- $name\n" . join('', map { substr($_, 0, 400) . "\n" } split(/\n/, $out)) if $out ne '';
	}
	return $text . "-- the last of what happened\n" . join('', grep { defined } (split(/^/, _slurp("$self->{dir}/chaos.log")))[ -40 .. -1 ]);
}

sub stop
{
	my ($self) = @_;
	$self->{load}->pause if $self->{load};
	$self->stop_gateway('TERM') if $self->{gateway};
	$_->stop('INT') foreach grep { $_ } @$self{qw(shop central)};
	$self->{link}->stop if $self->{link};
	return;
}

sub _slurp
{
	my ($file) = @_;
	open(my $fh, '<', $file) or return '';
	local $/ = undef;
	return scalar(<$fh>) // '';
}

1;
